"""Episodes on disk: as samples of a data set, and as films.

Axes: T steps of an episode, P numbers of a state (proprio), A of an action, H, W of a picture.
"""
import io
import json
import os

import numpy as np

import manifests


def samples(key, proprio, actions, pictures, meta, each, steps=16, kind='png'):
    """[(key, {extension: bytes})] of an episode: proprio (T, P), actions (T, A), pictures {camera:
    T frames}, uint8 (H, W, 3). For .json: meta, and each, a list of T dicts with an instruction.

    With pictures a sample is a time step: `key-t.<camera>.<kind>`, `.lowdim.npz` with a chunk of
    `steps` actions and `is_pad` at the episode's end. Without, and with one instruction, it is the
    episode: `.lowdim.npy`, a row a step."""
    wordings = {words['instruction'] for words in each}
    if not pictures and len(wordings) == 1:
        return [(key, whole_episode(proprio, actions, meta, each[0]['instruction']))]

    # Frames may come from a film: one after the other, never all of them at once.
    views = {camera: iter(frames) for camera, frames in pictures.items()}
    out = []
    for t in range(len(actions)):
        # The last chunks reach past the end: zeros that is_pad tells from actions.
        chunk = actions[t:t + steps]
        padded = np.pad(chunk, ((0, steps - len(chunk)), (0, 0)))
        is_pad = np.arange(steps) >= len(chunk)
        lowdim = saved(np.savez, proprio=proprio[t], actions=padded, is_pad=is_pad)

        said = each[t] | meta | dict(frame=t)
        members = {'json': json.dumps(said).encode(), 'lowdim.npz': lowdim}
        for camera, frames in views.items():
            members[f'{camera}.{kind}'] = encoded(next(frames), kind)
        out.append((f'{key}-{t:06d}', members))
    return out


def whole_episode(proprio, actions, meta, instruction):
    """The members of an episode without pictures: training decides how long its chunks are."""
    fields = [('proprio', '<f4', proprio.shape[1:]), ('actions', '<f4', actions.shape[1:])]
    rows = np.zeros(len(actions), fields)
    rows['proprio'], rows['actions'] = proprio, actions

    # What meta says of an instruction goes before.
    said = dict(instruction=instruction) | meta
    return {'json': json.dumps(said).encode(), 'lowdim.npy': saved(np.save, rows)}


def saved(save, *args, **arrays):
    """The bytes of what np.save or np.savez would write."""
    file = io.BytesIO()
    save(file, *args, **arrays)
    return file.getvalue()


def encoded(frame, kind):
    """uint8 (H, W, 3) -> the bytes of a picture, png or jpg."""
    from PIL import Image
    file = io.BytesIO()

    # PNG keeps every value and does not look at the quality.
    name = {'png': 'PNG', 'jpg': 'JPEG'}[kind]
    Image.fromarray(frame).save(file, name, quality=95)
    return file.getvalue()


class Recorder:
    """Writes episodes that `rollouts` has kept as a data set, a shard a task. Raises ValueError if
    the folder holds one."""

    def __init__(self, folder, action_steps=16):
        self.folder, self.action_steps = folder, action_steps
        self.shards, self.counts = {}, {}           # task -> its shard, its row of the manifest

        # Refused before the first rollout: what it would write over may have taken hours.
        os.makedirs(folder, exist_ok=True)
        is_there = os.path.exists(os.path.join(folder, 'manifest.jsonl'))
        if is_there and not manifests.is_unfinished(folder):
            raise ValueError(f'{folder} holds a data set already: name another folder')

    def write(self, result, fps, pictures=True):
        """An episode; pictures=False leaves them out."""
        task, actions = result['task'], result['actions']
        if task not in self.shards:
            self.open_shard(task)

        # Where it comes from, and the sentence, which is the same at each step.
        meta = {name: result[name] for name in ('task', 'seed', 'success')}
        meta |= dict(goal=result['goal'].tolist(), fps=fps)
        each = [dict(instruction=result['instruction'])] * len(actions)

        # A policy that sees none may have been filmed all the same.
        views = {}
        if pictures:
            views = result['pictures']

        # A sample for each step, or one for all of them.
        written = samples(f'{task}-{result["seed"]}', result['proprio'], actions, views, meta,
                          each, self.action_steps)
        for key, members in written:
            self.shards[task].write({'__key__': key, **members})
        self.counts[task]['num_sequences'] += len(actions)
        self.counts[task]['episodes'] += 1

    def open_shard(self, task):
        """Begin the shard of a task."""
        from webdataset import TarWriter
        path = os.path.join(self.folder, f'{task}.tar')
        manifests.begin(self.folder, 'sample.py --record')

        # No time of day: the same episodes are the same bytes.
        self.shards[task] = TarWriter(path, encoder=False, mtime=0.0)
        self.counts[task] = dict(shard=task, num_sequences=0, episodes=0)

    def close(self):
        """The number of steps written."""
        for shard in self.shards.values():
            shard.close()

        manifests.finish(self.folder, self.counts.values())
        return sum(row['num_sequences'] for row in self.counts.values())


def write_film(path, task, pictures, fps):
    """What the first camera saw, in real time: a.mp4 becomes a_<task>.mp4 of all frames, other
    names a_<task>.gif of every fourth one. The file's name."""
    frames = next(iter(pictures.values()))
    name, ending = os.path.splitext(path)

    # A film of each task, from the one name that the command gives.
    if ending == '.mp4':
        path = f'{name}_{task}.mp4'
        write_mp4(path, frames, fps)
    else:
        path = f'{path.removesuffix(".gif")}_{task}.gif'
        write_gif(path, frames, fps)
    return path


def write_mp4(path, frames, fps):
    """uint8 (T, H, W, 3) -> a film of h264."""
    import av
    with av.open(path, 'w') as container:
        stream = container.add_stream('libx264', rate=fps, options={'crf': '18'})

        # yuv420p has a colour for two pixels by two: an odd row or column is cut off.
        stream.height = frames.shape[1] - frames.shape[1] % 2
        stream.width = frames.shape[2] - frames.shape[2] % 2
        stream.pix_fmt = 'yuv420p'
        for frame in frames:
            frame = np.ascontiguousarray(frame[:stream.height, :stream.width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))

        # What the codec still holds back.
        container.mux(stream.encode())


def write_gif(path, frames, fps):
    """uint8 (T, H, W, 3) -> a film that goes on for ever."""
    from PIL import Image

    # Every fourth frame, 4 / fps seconds long.
    first, *rest = [Image.fromarray(frame) for frame in frames[::4]]
    first.save(path, save_all=True, append_images=rest, duration=4000 // fps, loop=0)
