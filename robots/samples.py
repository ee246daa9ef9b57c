"""From a robot's sample to what its model gets: the tasks policy and vla write their rows so.

Axes: A samples with actions, H actions of a chunk, D numbers of an action, P of a state.
"""
import base64
import json

import fsspec
import numpy as np

import tasks
from diffusion import random_keys
from parallel import say
from processor import BESIDE, HIDDEN, LEARNED, SEEN, document, is_document, question
from robots import actions, cameras
from robots.cameras import names_in
from robots.chunks import nothing
from shards import BadSample
from tasks import vlm

# what stands for a camera that is missing: a black pixel, as PNG
BLACK = base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2'
                         'FzhVAAAAAElFTkSuQmCC')
# of these a run keeps the statistics that it began with
FILES = ('stats.json',)
# what samples and the model's config have in common
SIZES = 'action_steps', 'action_dim', 'proprio_dim'


def form(sample, p):
    """<image>..., bos, instruction, newline, all seen by all, and an answer, if there is one, as
    paligemma has it; beside them the actions and the state. What has no actions is as a vlm has
    it: cameras are of robots."""
    # an observation brings its arrays, as robots/acting.py makes it; a shard's sample has a member
    lowdim = sample.get('_lowdim') or actions.read(sample.get('members', {})).get('lowdim')
    if not lowdim:
        return vlm.form(sample, p)
    beside = [(padded(lowdim, p), BESIDE)]

    # actions alone are a sample: without words the run's are said, and nothing needs an answer
    if not sample.keys() & {'text', 'suffix', 'messages'}:
        sample.setdefault('instruction', p.prompt)
    sample['_asking'] = True
    if is_document(sample):
        return document(sample, p) + beside

    # what is seen
    pictures = [(picture, SEEN) for picture in sample['pictures']]
    if p.settings['cameras'] and p.eyes:
        pictures, mask = by_camera(sample, p.settings)
        beside.append((dict(camera_mask=mask), BESIDE))

    # what is said; most samples of robots have no answer
    prefix, suffix = question(sample, p)
    parts = [*pictures, (p.tokenizer.bos_id, SEEN), (prefix + '\n', SEEN)]
    if suffix:
        parts += [(suffix, LEARNED), (p.tokenizer.eos_id, LEARNED)]
    return parts + beside


def by_camera(sample, settings):
    """The pictures of the cameras that the settings name, in their order, and which are there,
    bool (cameras,). One that is missing is black, and nobody sees it. Raises BadSample."""
    # extensions count in any case
    by_name, twice = {}, set()
    for name, picture in zip(sample['picture_names'], sample['pictures']):
        name = name.lower()
        if name in by_name:
            twice.add(name)
        by_name[name] = picture

    names, parts, is_there = names_in(sample.get('data_set'), settings), [], []
    for camera in settings['cameras']:
        # of a camera that its data set lacks there is no name
        name = names.get(camera)
        is_there.append(name is not None and name.lower() in by_name)
        if not is_there[-1]:
            parts.append((BLACK, HIDDEN))
            continue
        if name.lower() in twice:
            raise BadSample(f'it has two pictures of camera {name!r}')
        parts.append((by_name[name.lower()], SEEN))
    return parts, np.array(is_there)


def padded(lowdim, p):
    """Actions and state of one sample at the sizes of the settings, with masks of what is real.
    Raises BadSample."""
    steps, size, state_size = (p.settings[key] for key in SIZES)
    chunk, is_pad, proprio = lowdim['actions'], lowdim['is_pad'], lowdim['proprio']
    # a run that is not to see the state
    if not state_size:
        proprio = proprio[:0]
    if len(chunk) > steps or chunk.shape[1] > size or len(proprio) > state_size:
        raise BadSample(f'actions {chunk.shape} and proprio {proprio.shape} are larger than '
                        f'action_steps={steps}, action_dim={size}, proprio_dim={state_size}')

    # numbers without statistics would be learned as they are
    known = getattr(p, 'known_numbers', (size, state_size))
    if chunk.shape[1] > known[0] or len(proprio) > known[1]:
        raise BadSample(f'{chunk.shape[1]} numbers of an action and {len(proprio)} of a state: '
                        f'stats.json has {known[0]} and {known[1]}; python prepare/stats.py makes '
                        'it anew')

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
    for key, least in dict(action_dim=1, action_steps=1, proprio_dim=0).items():
        if not least <= settings[key] <= 1 << 20:
            raise ValueError(f'{key}={settings[key]} must be at least {least}, and at most 2^20')
    cameras.check(settings)


def sizes(settings):
    """What samples and the model's config have in common."""
    return {key: settings[key] for key in SIZES}


def statistics(settings, folders, learns_text=True):
    """stats.json of prepare/stats.py: the setting's, or the one beside the one data set of a mix
    that has actions; `cameras`: those of the samples, where the settings name none. Raises
    ValueError for what does not fit the data sets."""
    found = cameras.surveys(settings, folders)
    robots = [folder for folder, each in zip(folders, found) if each.samples]
    idle = [each.name for each in found if not each.samples]
    if idle and not learns_text:
        say(f'no actions in {", ".join(idle)}: nothing is learned from there')

    # normalised by other numbers, the actions of one data set are not those of another
    path = settings['stats']
    names = ','.join(folder.path for folder in robots or folders)
    if not path and len(robots) != 1:
        raise ValueError(f'{len(robots)} data sets have actions, and one stats.json: python '
                         f'prepare/stats.py --data={names} --out=stats.json, and '
                         '--stats=stats.json')
    path = path or robots[0].base.rstrip('/') + '/stats.json'
    try:
        with fsspec.open(path, 'r', encoding='utf-8') as file:
            stats = json.load(file)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f'stats={path!r} can not be read ({error}): python prepare/stats.py '
                         f'--data={names} makes it') from None

    cameras.check_statistics(stats, path, found, settings)
    if tasks.load(settings['task']).eyes(settings):
        seen = cameras.check_pictures(settings, found)
        # who acts shows the policy the same
        if seen and not settings['cameras']:
            stats['cameras'] = seen
    return {'stats.json': stats}


def prepare(run):
    """run.units turns a robot's numbers into the model's, and back. Raises ValueError."""
    settings = run.settings

    # the forms of other tasks know nothing of actions, which would be left out in silence
    if run.processor.form != 'auto' and '.py:' not in run.processor.form:
        raise ValueError(f'processor={settings["processor"]!r} writes no actions: take auto, a '
                         'model folder of PaliGemma, or a function of yours (file.py:function)')
    for key, part in dict(action_dim='actions', proprio_dim='proprio').items():
        own = len(run.kept['stats.json'].get(part, {}).get('mean', ()))
        # proprio_dim=0 leaves the state out
        if own > settings[key] and (settings[key] or key == 'action_dim'):
            raise ValueError(f'{key}={settings[key]}: {part} have {own} numbers, says stats.json: '
                             f'set {key}={own}, or make the statistics of this data set '
                             '(prepare/stats.py)')
    units = actions.Units(run.kept['stats.json'], settings['normalize'], settings['action_steps'],
                          settings['action_dim'], settings['proprio_dim'])
    run.units = units.to(run.device)
    run.processor.known_numbers = units.known_numbers


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
