"""A policy acts: in a simulator, beside its controls, or for robots that ask over a network.

    python sample.py --out_dir=out/policy_metaworld_state --env=metaworld --episodes=20
    python sample.py --out_dir=out/policy_metaworld_state --serve_policy=8000

Axes: A observations, T actions of a chunk, D numbers of an action, P of a state.
"""
import json
import os
import sys

import numpy as np
import torch

import shards
from diffusion import random_keys
from processor import collate
from robots import actions, metaworld, pusht, record, rollouts, simulators
from tasks import body_of
from usage import refuse_unused

# settings that a server does not read
IN_SIMULATORS = ('env', 'tasks', 'episodes', 'execute', 'held_out', 'controls', 'film', 'record',
                 'processes')
FILM_SIZE = 192                 # pixels of a side of the pictures, where the policy needs none


class SampleSettings:
    """What sample.py takes with a run of task=policy or task=vla."""
    env = ''                    # metaworld | pusht: let the policy act there
    tasks = ''                  # of MetaWorld, separated by commas (empty: all eight)
    episodes = 20               # a task; their goals are in no demonstration
    execute = 8                 # actions done of a chunk before the policy looks again
    sample_steps = 10           # of denoising
    sampler = ''                # euler | heun | ddim | ddpm (empty: the first that fits)
    held_out = False            # say the task in words that no demonstration has
    controls = True             # also measure the expert, a replayed demonstration, random, zero,
    #                             and a wrong sentence
    film = ''                   # films of the first episode of each task: a.gif or a.mp4 becomes
    #                             a_<task>.gif or .mp4
    record = ''                 # a folder: the policy's episodes as a data set of shards
    processes = 2               # that step environments
    serve_policy = 0            # a port: answer robots there, see serve/server.py
    serve_host = '127.0.0.1'    # who may ask: this machine (0.0.0.0: all that reach it)
    serve_token = ''            # a file of one word that robots must send (empty: all may ask)
    image = ''                  # not of a policy: it acts
    prompt = ''                 # not of a policy: it acts
    eval = ''                   # not of a policy: it acts


def sample(run, options):
    """Let a policy act in --env, or answer robots at --serve_policy."""
    task, where = run.settings['task'], options.out_dir
    if options.image or options.prompt or options.eval:
        raise ValueError(f'{where} is task={task}: give --env=metaworld or --serve_policy=8000')
    known = body_of(SampleSettings)
    if options.serve_policy:
        refuse_unused(vars(options), known, IN_SIMULATORS,
                      f'--serve_policy={options.serve_policy} answers robots')
        if not 0 < options.serve_policy < 65536:
            raise ValueError(f'--serve_policy={options.serve_policy}: expected a port from 1 to '
                             '65535')
        answer_robots(run, options)
    elif options.env:
        refuse_unused(vars(options), known, ('serve_host', 'serve_token'),
                      f'--env={options.env} is no server')
        if options.env not in ('metaworld', 'pusht'):
            raise ValueError(f'--env={options.env}: {where} is task={task}; policies act in '
                             'metaworld or pusht')
        try:
            act_out(run, options)
        except ImportError as error:        # simulators are packages of their own
            raise ValueError(f'--env={options.env}: {error}') from error
    else:
        raise ValueError(f'{where} is task={task}: give --env=metaworld or --serve_policy=8000')


# -----------------------------------------------------------------------------------------------
# observations to actions


def reads_words(run):
    """Does the policy read a sentence? A VLA always does."""
    return run.settings.get('policy.encoder') != 'none'


def seen_by(run):
    """Names of the cameras that a policy was trained on, in their order; 'image' where a picture
    had no name, [] where it is blind or nobody wrote it down."""
    if not run.processor.eyes:
        return []
    cameras = run.settings['cameras'] or run.kept['stats.json'].get('cameras', [])
    return [name or 'image' for name in cameras]


def lacked(run):
    """The set of those of them that not every data set had: a robot may do without."""
    cameras = set()
    for names in run.settings.get('cameras_of', {}).values():
        cameras |= set(seen_by(run)) - names.keys()
    return cameras


def names_in_order(run, given):
    """Names of an observation's pictures, in the order in which the policy was trained on them.
    Raises ValueError."""
    names = seen_by(run)
    # one picture is the one, whatever it is called
    if not run.settings['cameras'] and len(names) < 2 and len(given) == 1:
        return list(given)
    if not names:
        return sorted(given)
    for name in names:
        if name not in given and name not in lacked(run):
            raise ValueError(f'no picture of camera {name!r}, which the policy was trained on: '
                             f'there are {", ".join(given) or "none"}')
    return [name for name in names if name in given]


def policy_of(run, options, words=None, is_blank=False, action_dim=0):
    """A function of observations, as rollouts.rollouts takes it. words: task -> the sentence it is
    told; is_blank: it sees white pictures; action_dim: of a robot with fewer numbers than the
    run's largest."""
    action_dim = action_dim or len(run.kept['stats.json']['actions']['mean'])

    def act(observations):
        """Actions (A, T, D) in the robot's units."""
        # the batch is made as training makes it, of samples that are observations
        pieces = []
        for observation in observations:
            sample = sample_of(run, observation, words, is_blank, action_dim)
            piece, = run.processor.row(sample)
            position = observation['seed'] * 4096 + observation['step']
            pieces.append(piece | dict(part=0, position=position))
        tensors = run.inputs(shortened(collate(pieces, run.processor)))

        # noise is by (seed, step): in another batch a robot's actions are the same to rounding
        positions = torch.tensor([piece['position'] for piece in pieces])
        keys = random_keys(options.seed, positions).to(run.device)
        lowdim = tensors['lowdim'] | dict(keys=keys)
        seen = {key: tensors.get(key) for key in ('tokens', 'pixels', 'blocks', 'segments')}
        chunk = run.model.sample(**seen, lowdim=lowdim, steps=options.sample_steps,
                                 sampler=options.sampler)

        # relative actions begin at the state, in the robot's own units
        chunk = run.units.decode(chunk, states_of(run, observations))
        return chunk[..., :action_dim].cpu().numpy()

    return act


def sample_of(run, observation, words, is_blank, action_dim):
    """An observation as if it were read from a shard."""
    pictures, names = [], []
    if run.processor.eyes:
        names = names_in_order(run, observation['pictures'])
        pictures = [observation['pictures'][name] for name in names]
    if is_blank:
        pictures = [np.full_like(picture, 255) for picture in pictures]
    instruction = words(observation['task']) if words else observation['instruction']

    # of the chunk that is to come it is only looked at how large it is
    chunk = np.zeros((run.settings['action_steps'], action_dim), np.float32)
    lowdim = dict(actions=chunk, is_pad=np.zeros(len(chunk), bool),
                  proprio=state_of(run, observation))
    return dict(pictures=pictures, picture_names=names, instruction=instruction,
                _lowdim=lowdim)


def state_of(run, observation):
    """The state (P,) of an observation, as far as the run looks at it."""
    if not run.settings['proprio_dim']:
        return np.zeros(0, np.float32)
    return np.asarray(observation['proprio'], np.float32)


def states_of(run, observations):
    """The states as the robots have them, (A, P), padded with zeros to the run's size."""
    states = torch.zeros(len(observations), run.settings['proprio_dim'], device=run.device)
    for row, observation in zip(states, observations):
        state = torch.as_tensor(state_of(run, observation))
        row[:len(state)] = state.to(run.device)
    return states


def shortened(batch):
    """A batch without the columns that are padding in every row."""
    if 'segments' not in batch:         # every row is full
        return batch
    width = int((batch['segments'] > 0).any(0).nonzero()[0].max()) + 1
    cut = {key: batch[key][:, :width] for key in ('tokens', 'targets', 'blocks', 'segments')
           if key in batch}
    return batch | cut


# -----------------------------------------------------------------------------------------------
# in a simulator


def demonstrations(run, options, names):
    """{task: actions (T, D)}: one demonstration of each task that the run's data sets have."""
    found = {}
    for data_set in run.settings['mix']:
        folder = shards.Folder(data_set, options.data_dir or run.settings['data_dir'])
        for shard, size in enumerate(folder.sizes):
            read_demonstrations(folder, shard, size, names, found)
    return {task: found[task] for task in names if task in found}


def read_demonstrations(folder, shard, size, names, found):
    """The first episode of a shard of steps, or the first of each task in a shard of whole
    episodes, into `found`."""
    index, is_episode = 0, False
    while index < size and not (is_episode and set(names) <= set(found)):
        members = folder.read(shard, index)
        meta, lowdim = json.loads(members['json']), actions.read(members).get('lowdim')
        task, is_episode = meta.get('task'), 'lowdim.npy' in members
        if lowdim is None:
            return

        # an episode is read whole, from its first step on: the next begins behind its last
        if is_episode:
            found.setdefault(task, lowdim['actions'])
            index += len(lowdim['actions'])
            continue

        # steps one by one, until the next episode begins; such a shard has one task
        if meta.get('frame', 0) < len(found.get(task, ())):
            return
        found.setdefault(task, []).append(lowdim['actions'][0])
        index += 1


def held_out_words(task):
    """A sentence for a task that no demonstration has."""
    return simulators.instruction(task, held_out=True)


def policies_of(run, options, robot, names):
    """{label: policy}: the run's own, and its controls."""
    def own(words=None, is_blank=False):
        return policy_of(run, options, words, is_blank, robot.action_dim)

    words = held_out_words if options.held_out else None
    policies = {'policy': own(words)}
    if not options.controls or options.env != 'metaworld':
        return policies

    # what does not look: MetaWorld's actions are four numbers of -1 to 1
    execute = options.execute
    policies['expert'] = metaworld.expert
    policies['random'] = rollouts.random_policy([-1] * 4, [1] * 4, execute)
    policies['zero'] = rollouts.zero(4, execute)
    shown = demonstrations(run, options, names)
    if set(shown) == set(names):
        policies['replay'] = rollouts.replay(shown, execute)

    # and the policy itself, told of another task, or blind
    if len(names) > 1 and reads_words(run):
        next_task = dict(zip(names, names[1:] + names[:1]))
        policies['wrong words'] = own(lambda task: simulators.instruction(next_task[task]))
    if run.processor.eyes:
        policies['blank picture'] = own(is_blank=True)
    return policies


def act_out(run, options):
    """A table of successes: a row a policy, beside its controls; 95 % intervals by Wilson."""
    robot, known = metaworld.MetaWorld, list(metaworld.TASKS)
    if options.env == 'pusht':
        robot, known = pusht.PushT, ['pusht']
    names = [name for name in options.tasks.split(',') if name] or known
    for name in set(names) - set(known):
        raise ValueError(f'--tasks={options.tasks}: {name!r} is none of {", ".join(known)}')
    check_sizes(run, options, robot)

    # every policy meets the same goals
    seeds = range(simulators.TEST_SEED, simulators.TEST_SEED + options.episodes)
    episodes = [(name, seed) for name in names for seed in seeds]
    for label, policy in policies_of(run, options, robot, names).items():
        won = play(run, options, robot, episodes, label, policy)
        low, high = rollouts.wilson(sum(won.values()), len(episodes))
        share = sum(won.values()) / len(episodes)
        if options.json:
            print(json.dumps(dict(policy=label, success=share, low=low, high=high,
                                  episodes=options.episodes, tasks=won)), flush=True)
        else:
            each = ', '.join(f'{name} {n}' for name, n in won.items())
            print(f'{label:14} {share:6.1%} [{low:.1%}, {high:.1%}] of {len(episodes)}: {each}',
                  flush=True)


def check_sizes(run, options, robot):
    """Raises ValueError where a robot has more numbers than the run was trained on, or nothing is
    to be done."""
    for key in ('episodes', 'execute'):
        if getattr(options, key) < 1:
            raise ValueError(f'{key}={getattr(options, key)} must be at least 1')
    proprio_dim = robot.proprio_dim
    if options.env == 'metaworld' and run.processor.eyes:
        proprio_dim = robot.hand_dim                # who sees is not told where things are
    stats = run.kept['stats.json']
    own_actions, own_states = len(stats['actions']['mean']), len(stats['proprio']['mean'])
    if not run.settings['proprio_dim']:
        proprio_dim = 0
    if own_actions < robot.action_dim or own_states < proprio_dim:
        raise ValueError(f'--env={options.env}: actions of {robot.action_dim} and states of '
                         f'{proprio_dim} numbers, {options.out_dir} was trained on {own_actions} '
                         f'and {own_states}')


def play(run, options, robot, episodes, label, policy):
    """{task: successes} of a policy in episodes [(task, seed), ...]; the run's own is filmed and
    recorded, where that is asked for."""
    is_blind, is_own = not run.processor.eyes, label == 'policy'
    size = 0
    if not is_blind:
        size = run.settings['vit.image_size']
    elif options.film:
        size = FILM_SIZE

    # filmed: the first episode of each task; shown: whose pictures are kept; kept: whose states
    # and actions are
    filmed, shown, kept, recorder = (), (), (), None
    if options.film and is_own:
        filmed = shown = episodes[::options.episodes]
    if options.record and is_own:
        recorder, kept = record.Recorder(options.record, run.settings['action_steps']), episodes
        if not is_blind:
            shown = episodes

    def make(task):
        # one camera without a name is the environment's own
        cameras = seen_by(run)
        if cameras == ['image'] and not run.settings['cameras']:
            cameras = []
        return simulators.make(task, size, cameras, 0, is_blind)

    # the expert looks at every step; with pictures, an environment takes 60 MB
    execute, won = options.execute, {task: 0 for task, _ in episodes}
    if label == 'expert':
        execute = 1
    for _, result in rollouts.rollouts(
            episodes, policy, execute, make=make, parallel=min(options.batch_size, 16),
            processes=options.processes, keep=kept, show=shown, blind=is_blind):
        task = result['task']
        won[task] += result['success']
        if (task, result['seed']) in filmed:
            path = record.write_film(options.film, task, result['pictures'], robot.fps)
            print(f'film of {task}: {path}', file=sys.stderr)
        if recorder:
            # the sentence that the policy was told
            if options.held_out:
                result = result | dict(instruction=held_out_words(task))
            recorder.write(result, robot.fps, not is_blind)
    if recorder:
        print(f'{options.record}: {recorder.close()} steps recorded', file=sys.stderr)
    return won


# -----------------------------------------------------------------------------------------------
# for robots


def fields_of(run):
    """What an observation holds: {name: (dtype, shape, may it be missing)}."""
    side = run.settings['vit.image_size']
    num_states = len(run.kept['stats.json']['proprio']['mean'])
    # a state that is not looked at may be sent all the same
    is_unseen = not run.settings['proprio_dim']
    fields = dict(proprio=('float32', (num_states,), is_unseen),
                  instruction=('str', (), not reads_words(run)))
    for name in cameras_asked(run):
        fields[name] = 'uint8', (side, side, 3), name in lacked(run)
    return fields | dict(seed=('int64', (), True), step=('int64', (), True))


def cameras_asked(run):
    """Names of the pictures that a robot sends."""
    if not run.processor.eyes:
        return []
    return seen_by(run) or ['image']


def answer_robots(run, options):
    """A server, until SIGTERM or Ctrl-C; see serve/server.py."""
    try:
        from serve import server as serve
    except ImportError as error:
        raise ValueError(f'--serve_policy needs a package that is not here ({error}): pip install '
                         'aiohttp') from None
    fields, cameras = fields_of(run), cameras_asked(run)
    policy = policy_of(run, options)

    def act(observations):
        """Pictures come beside the rest; a simulator has them in a dict."""
        given = []
        for observation in observations:
            # the server puts a 0 for what may be missing
            pictures = {name: observation[name] for name in cameras if np.ndim(observation[name])}
            given.append(observation | dict(pictures=pictures))
        return policy(given)

    try:
        server = serve.Server(act, fields, options.serve_policy, options.serve_host,
                              options.batch_size, token=token_of(options))
    except OSError as error:
        raise OSError(f'--serve_policy={options.serve_policy}: {error.strerror}') from None
    server.run()


def token_of(options):
    """What robots must send, the text of a file; '' where all may ask. Raises ValueError."""
    path = options.serve_token
    if not path:
        if options.serve_host not in ('127.0.0.1', 'localhost'):
            print(f'--serve_host={options.serve_host}: all that reach it may ask; with '
                  '--serve_token=FILE only those that know its text', file=sys.stderr)
        return ''
    try:
        with open(os.path.expanduser(path), encoding='utf-8') as file:
            token = file.read().strip()
    except (OSError, ValueError) as error:
        raise ValueError(f'--serve_token={path}: expected a file of text ({error})') from None
    # what a header can hold
    if not token.isascii() or not token.isprintable() or ' ' in token or not token:
        raise ValueError(f'--serve_token={path}: expected one word of letters and digits in it')
    return token
