"""The tasks of one joint network (arXiv 2303.06555, sections 4.1, 5 and 6.3 and appendix): who is drawn, who is given.

Each modality of a network call is in one of three states, told by its timestep alone: drawn (the sampler's timestep), given
(0, or a higher timestep for a condition that is only partly trusted), or left out (the last timestep, pure noise).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from unidiffuser.modalities import Modality


class Task(BaseModel):
    """Draw the modalities ``sample`` together, given the modalities ``given``; all others are left out.

    >>> Task(sample=("image",), given=("text", "label"))
    Task(sample=('image',), given=('text', 'label'))
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample: tuple[str, ...]
    given: tuple[str, ...] = ()


TASKS = {
    "t2i": Task(sample=("image",), given=("text",)),
    "i2t": Task(sample=("text",), given=("image",)),
    "joint": Task(sample=("image", "text")),
    "i": Task(sample=("image",)),
    "t": Task(sample=("text",)),
}

CHAINS = {"i2t2i": ("i2t", "t2i"), "t2i2t": ("t2i", "i2t")}

TASK_NAMES = (*TASKS, *CHAINS, "gibbs", "interpolate")


def task_named(task: str | Task, modalities: Sequence[Modality]) -> Task:
    """The task of a name, checked against what is modelled.

    Raises:
        ValueError: there is no such task, or it names a modality that is not modelled, or one twice.
    """
    if isinstance(task, str):
        if task not in TASKS:
            raise ValueError(f"no task named {task!r}; there are {', '.join(TASK_NAMES)}")
        task = TASKS[task]
    names = [modality.name for modality in modalities]
    named = (*task.sample, *task.given)
    if not task.sample or len(set(named)) < len(named) or not set(named) <= set(names):
        raise ValueError(f"a task draws and is given different ones of the modalities {', '.join(names)}, not {task}")
    return task
