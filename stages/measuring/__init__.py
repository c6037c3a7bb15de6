"""What a checkpoint is worth: samples of its tasks, the features of networks that look at them, and measures of these."""
