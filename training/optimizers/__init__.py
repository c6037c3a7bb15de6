"""The optimizers that a training can choose from, each with its configuration beside its code.

>>> from training.optimizers.adamw import AdamW
>>> AdamW().lr
0.0002
"""
