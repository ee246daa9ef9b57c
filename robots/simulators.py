"""Simulators behind one small interface: which one a task belongs to, and what it is called.

    env = simulators.make('reach', size=64)     # size 0: no pictures
    seen = env.reset(seed=1_000_000)            # the seed decides the goal and all that is random
    seen, success = env.step(action)            # seen: see MetaWorld.observe
"""
from robots import metaworld, pusht

# Demonstrations have seeds below, tests from there on: the goals of tests are in no demonstration.
TEST_SEED = 1_000_000

# The last so many wordings of a task are not in demonstrations.
HELD_OUT = 3


def make(task, size=0, cameras=(), max_steps=0, blind=False):
    """The environment of a task, a key of metaworld.TASKS or 'pusht'. size: of the pictures, 0 for
    none. cameras: () for the environment's own. max_steps: of an episode, 0 for the environment's
    own. blind: the pictures are not for who acts. Raises ValueError."""
    if task == 'pusht':
        # it is seen from above, whatever who acts calls that
        if len(cameras) > 1:
            raise ValueError(f'cameras {", ".join(cameras)}: pusht has one, from above')
        return pusht.PushT(size, max_steps or 300, *cameras)
    if task not in metaworld.TASKS:
        known = ', '.join(metaworld.TASKS)
        raise ValueError(f'task {task!r}: expected one of {known}, pusht')
    return metaworld.MetaWorld(task, size, cameras or ('near',), max_steps or 500, blind)


def instruction(task, number=0, held_out=False):
    """A sentence for a task: wording `number` of those of the demonstrations, or of those held
    out."""
    if task == 'pusht':
        words = pusht.WORDINGS
    else:
        words = metaworld.TASKS[task][2]

    # Beyond the last one they begin anew.
    if held_out:
        words = words[-HELD_OUT:]
    else:
        words = words[:-HELD_OUT]
    return words[number % len(words)]
