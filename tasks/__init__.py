"""Tasks by name: a file of this folder, or one of yours (`--task=mine.py`).

A task is a file of plain names. It must have

    class TrainSettings             its body is the settings that the task adds to train.py's own
    class SampleSettings            and those that it adds to sample.py's
    form(sample, p)                 how a sample is written as tokens (top of processor.py)
    build(settings, tokenizer, load_weights=True)
                                    the model; load_weights=False: those of towers of transformers
                                    are not read, for a checkpoint has them

and the model's forward(**inputs) returns {kind: model.Learned}. It may have any of the names
below, which stand here as they are where a task does not say otherwise.
"""
import importlib
import importlib.util
import os
import sys

from configurator import flatten, plain

HERE = os.path.dirname(os.path.abspath(__file__))

# -----------------------------------------------------------------------------------------------
# what a task may say

KEPT = ()           # settings that a run keeps, beside those of its model's parts
FILES = ()          # JSON files that it keeps in each checkpoint: the names of `statistics`


def check(settings, world):
    """Raises ValueError for settings that can not be; lines on those that change nothing."""


def eyes(settings):
    """A pictures.Eyes, or None: pictures are left out."""


def statistics(settings, folders):
    """{name of FILES: value}, made when a run begins. Raises ValueError."""
    return {}


def prepare(run):
    """What else a run needs to be used, as attributes of it."""


def constants(run, folders):
    """Inputs of forward that are the same for every batch."""
    return {}


def inputs(run, batch, tensors):
    """What forward gets of a batch; tensors: of processor.to_device."""
    return tensors


def count(batch):
    """{kind: targets of a batch}, before it is on a device."""
    return {'text': batch['num_targets']}


def weights(settings):
    """{kind: what its mean weighs}, where that is not 1."""
    return {}


def arguments(settings):
    """What forward gets in training alone."""
    return {}


def scorer(settings):
    """A function of (run, batch, tensors) that counts the samples answered right, or None."""


def summary(run, folder, batches, losses):
    """{key: number}: what else validation says of a data set. losses: {kind: sum}."""
    return {}


def sample(run, options):
    """What sample.py does with a run."""
    raise ValueError(f'task={run.settings["task"]} has nothing that sample.py could show')


class SampleSettings:
    """None."""


OPTIONAL = ('KEPT FILES SampleSettings check eyes statistics prepare constants inputs count '
            'weights arguments scorer summary sample').split()

# -----------------------------------------------------------------------------------------------
# where tasks are


def names():
    """The tasks that are here."""
    files = sorted(name for name in os.listdir(HERE) if name.endswith('.py'))
    return [name.removesuffix('.py') for name in files if name != '__init__.py']


def path_of(name):
    """The file of a task. Raises ValueError."""
    path = os.path.join(HERE, f'{name}.py')
    if str(name).endswith('.py'):
        path = os.path.abspath(os.path.expanduser(name))
        if not os.path.isfile(path):
            raise ValueError(f'task={name!r}: there is no file {path}; the checkpoints of a run '
                             'keep its own')
    elif name not in names():
        raise ValueError(f'task={name!r}: expected one of {", ".join(names())}, or a file of '
                         'yours, such as mine.py')
    return path


def load(name):
    """The module of a task, with all of the names above. Raises ValueError."""
    path = path_of(name)
    if name.endswith('.py'):
        task = load_file(path)
    else:
        task = importlib.import_module(f'tasks.{name}')
    for key in OPTIONAL:
        if not hasattr(task, key):
            setattr(task, key, globals()[key])
    for key in ('TrainSettings', 'form', 'build'):
        if not hasattr(task, key):
            raise ValueError(f'task={name!r}: {path} has no {key} (top of tasks/__init__.py)')
    if name.endswith('.py'):
        from yours import watch
        watch(task, path)
    return task


def load_file(path):
    """The module of a file of yours, imported once."""
    module_name = 'task_' + path.replace('/', '_').replace('.', '_')
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module_name])
    return sys.modules[module_name]


def train_settings(name):
    """{name: default} of what a task adds to train.py. Raises ValueError."""
    return body_of(load(name).TrainSettings)


def defaults(name):
    """The flat settings of a task as they are where nobody sets them. Raises ValueError."""
    return plain(flatten(train_settings(name)))


def body_of(settings):
    """{name: default} of a class of settings, with those that it inherits."""
    body = {}
    for cls in reversed(settings.__mro__):
        body |= {key: value for key, value in vars(cls).items() if not key.startswith('_')}
    return body


def that_have(key, settings='TrainSettings'):
    """The tasks that have a setting, for the one who gave it to another."""
    # which is for those who ask for help, and here
    from usage import settings_in
    return [name for name in names() if key in settings_in(path_of(name), settings)]


def kept(task):
    """Names of the settings that a run keeps, and of its model's parts, with a dot."""
    parts = [key + '.' for key, value in body_of(task.TrainSettings).items()
             if hasattr(value, '__dataclass_fields__')]
    return *task.KEPT, *parts


# -----------------------------------------------------------------------------------------------
# what others made


def family(name):
    """A module of families/, imported when it is met: what is ours does not need it. Raises
    ValueError."""
    if not os.path.isdir(os.path.join(os.path.dirname(HERE), 'families')):
        raise ValueError('families/ is not here: models of others can not be fetched or opened')
    return importlib.import_module(f'families.{name}')


def tower(part, config, tokenizer, load_weights):
    """A model of transformers as a part of ours, where its config names one (`vit.hf`), else None.
    part: vit | decoder | text. Raises ValueError."""
    if not config.hf:
        return None
    return family('towers').open_tower(part, config, tokenizer.vocab_size, load_weights)
