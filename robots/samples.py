"""From a robot's sample to what its model gets: the tasks policy and vla write their rows so.

Axes: A samples with actions, H actions of a chunk, D numbers of an action, P of a state.
"""
import base64
import json

import fsspec
import numpy as np

from diffusion import random_keys
from processor import BESIDE, HIDDEN, LEARNED, SEEN, document, is_document, question
from robots import actions
from robots.chunks import nothing
from shards import BadSample

# what stands for a camera that is missing: a black pixel, as PNG
BLACK = base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2'
                         'FzhVAAAAAElFTkSuQmCC')
# of these a run keeps the statistics that it began with
FILES = ('stats.json',)


def form(sample, p):
    """<image>..., bos, instruction, newline, all seen by all, and an answer, if there is one, as
    paligemma has it; beside them the actions and the state."""
    # an observation brings its arrays, as robots/acting.py makes it; a shard's sample has a member
    lowdim = sample.get('_lowdim') or actions.read(sample.get('members', {})).get('lowdim')
    beside = []
    if lowdim:
        beside = [(padded(lowdim, p.settings), BESIDE)]

    # a state alone is a sample, and so is a text alone
    has_words = sample.keys() & {'text', 'suffix', 'messages'}
    if lowdim and not sample['pictures'] and not has_words:
        sample.setdefault('instruction', '')
    if is_document(sample):
        return document(sample, p) + beside

    # what is seen
    pictures = [(picture, SEEN) for picture in sample['pictures']]
    if p.settings['cameras'] and p.eyes:
        pictures, mask = by_camera(sample, p.settings['cameras'])
        if beside:
            beside.append((dict(camera_mask=mask), BESIDE))

    # what is said; most samples of robots have no answer
    prefix, suffix = question(sample, p)
    parts = [*pictures, (p.tokenizer.bos_id, SEEN), (prefix + '\n', SEEN)]
    if suffix:
        parts += [(suffix, LEARNED), (p.tokenizer.eos_id, LEARNED)]
    return parts + beside


def by_camera(sample, cameras):
    """The pictures of the cameras that the settings name, in their order, and which are there,
    bool (cameras,). One that is missing is black, and nobody sees it."""
    by_name = dict(zip(sample['picture_names'], sample['pictures']))
    parts = []
    for name in cameras:
        if name in by_name:
            parts.append((by_name[name], SEEN))
        else:
            parts.append((BLACK, HIDDEN))
    return parts, np.array([name in by_name for name in cameras])


def padded(lowdim, settings):
    """Actions and state of one sample at the sizes of the settings, with masks of what is real.
    Raises BadSample."""
    steps, size = settings['action_steps'], settings['action_dim']
    state_size = settings['proprio_dim']
    chunk, is_pad, proprio = lowdim['actions'], lowdim['is_pad'], lowdim['proprio']
    if len(chunk) > steps or chunk.shape[1] > size or len(proprio) > state_size:
        raise BadSample(f'actions {chunk.shape} and proprio {proprio.shape} are larger than '
                        f'action_steps={steps}, action_dim={size}, proprio_dim={state_size}')

    # everything is padding
    out = dict(actions=np.zeros((steps, size), np.float32), is_pad=np.ones(steps, bool),
               action_mask=np.zeros(size, bool), proprio=np.zeros(state_size, np.float32),
               proprio_mask=np.zeros(state_size, bool))

    # but for what the robot has, which comes first
    h, d = chunk.shape
    out['actions'][:h, :d] = chunk
    out['is_pad'][:h] = is_pad
    out['action_mask'][:d] = True
    out['proprio'][:len(proprio)] = proprio
    out['proprio_mask'][:len(proprio)] = True
    return out


# -----------------------------------------------------------------------------------------------
# training


def check(settings):
    """What both tasks ask of their settings. Raises ValueError."""
    # the model's are filled in by `sizes`
    task = settings['task']
    for key in ('action_dim', 'action_steps', 'proprio_dim'):
        inside = settings[f'{task}.{key}']
        if inside:
            raise ValueError(f'{task}.{key}={inside}: set {key}, which samples have, too')
    for key in ('action_dim', 'action_steps'):
        if settings[key] < 1:
            raise ValueError(f'{key}={settings[key]} must be at least 1')
    if settings['proprio_dim'] < 0:
        raise ValueError(f'proprio_dim={settings["proprio_dim"]} must be at least 0')


def sizes(settings):
    """What samples and the model's config have in common."""
    return {key: settings[key] for key in ('action_steps', 'action_dim', 'proprio_dim')}


def statistics(settings, folders):
    """stats.json of prepare/stats.py: the setting's, or the one beside the one data set of a mix.
    Raises ValueError."""
    # normalised by other numbers, the actions of one data set are not those of another
    path = settings['stats']
    if not path and len(folders) > 1:
        names = ','.join(folder.path for folder in folders)
        raise ValueError(f'{len(folders)} data sets have one stats.json: python prepare/stats.py '
                         f'--data={names} --out=stats.json, and --stats=stats.json')
    path = path or folders[0].base.rstrip('/') + '/stats.json'
    try:
        with fsspec.open(path, 'r', encoding='utf-8') as file:
            return {'stats.json': json.load(file)}
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f'stats={path!r} can not be read ({error}): python prepare/stats.py '
                         f'--data={folders[0].path} makes it') from None


def prepare(run):
    """run.units turns a robot's numbers into the model's, and back. Raises ValueError."""
    settings = run.settings

    # the forms of other tasks know nothing of actions, which would be left out in silence
    if run.processor.form != 'auto' and '.py:' not in run.processor.form:
        raise ValueError(f'processor={settings["processor"]!r} writes no actions: take auto, a '
                         'model folder of PaliGemma, or a function of yours (file.py:function)')
    units = actions.Units(run.kept['stats.json'], settings['normalize'], settings['action_steps'],
                          settings['action_dim'], settings['proprio_dim'])
    run.units = units.to(run.device)


def count_actions(batch):
    """Numbers of actions in a batch, as far as they are learned."""
    if 'beside' not in batch:           # a batch of texts and pictures
        return 0
    steps = (~batch['beside']['is_pad']).sum(1)
    return int((steps * batch['beside']['action_mask'].sum(1)).sum())


def lowdim_of(run, tensors, config):
    """What a batch has beside its rows, in the model's units; the noise and the times of a sample
    follow from its position."""
    if 'beside' not in tensors:
        return nothing(config, run.device)
    beside = tensors['beside']
    keys = random_keys(run.settings['seed'], beside['positions'])
    return run.units.encode(beside) | dict(keys=keys)
