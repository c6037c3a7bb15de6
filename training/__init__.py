"""Training: loader, objective step, DeepSpeed, EMA, checkpoints. Ray only to launch; no Prefect.

>>> from training.config import TrainConfig
>>> TrainConfig(steps=100, global_batch=8).worker_batch
8
"""
