"""What flows between stages: tars of pictures with captions, and what is known of each row."""
