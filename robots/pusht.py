"""PushT (PyPI gym-pusht): push a T onto its outline (Diffusion Policy, arXiv 2303.04137)."""
import os

import numpy as np

WORDINGS = (
    'push the T onto its outline',
    'move the T-shaped block to the target',
    'push the block into place',
    'align the T with the goal',
    'slide the T to the green T',
    'cover the target with the T',
    # held out, see robots/simulators.py
    'push the T to the goal',
    'bring the T onto the mark',
    'fit the T into the outline')


class PushT:
    """The interface is MetaWorld's. State: agent's and block's places and the block's angle;
    action: where the agent is to go, 2 numbers in pixels of 512. size > 0: pictures from above."""
    proprio_dim, action_dim, fps, task = 5, 2, 10, 'pusht'

    def __init__(self, size=0, max_steps=300, camera='top'):
        # pygame, when it is imported: no window, no greeting.
        os.environ.setdefault('SDL_VIDEODRIVER', 'dummy')
        os.environ.setdefault('PYGAME_HIDE_SUPPORT_PROMPT', '1')
        from gym_pusht.envs import PushTEnv
        self.size, self.max_steps, self.cameras = size, max_steps, {}
        if size:
            self.cameras[camera] = 'top'

        # Its renderer wants a size even if nobody looks.
        self.env = PushTEnv(obs_type='state', render_mode='rgb_array',
                            observation_width=size or 96, observation_height=size or 96)

    def reset(self, seed, pictures=True):
        """Begin the episode of a seed; its first observation."""
        self.seed, self.steps = seed, 0
        self.state = self.env.reset(seed=seed)[0]

        # The outline is always in the same place: what was drawn is where things begin.
        self.goal = self.state.copy()
        return self.observe(pictures)

    def step(self, action, pictures=True):
        """action (2,) in [0, 512], clipped. The observation after it, and whether it is done."""
        self.action = np.clip(np.asarray(action, np.float32), 0, 512)

        # gym-pusht is done when 95 % of the outline are covered.
        self.state, _, done, _, _ = self.env.step(self.action)
        self.steps += 1
        return self.observe(pictures), bool(done)

    def observe(self, pictures=True):
        """proprio fp32 (5,), pictures {camera: uint8 (size, size, 3)}, instruction, task, seed,
        step."""
        views = {}
        if pictures:
            views = {name: self.picture(name) for name in self.cameras}
        return dict(proprio=self.state.astype(np.float32), pictures=views,
                    instruction=WORDINGS[0], task='pusht', seed=self.seed, step=self.steps)

    def picture(self, camera):
        """uint8 (size, size, 3)."""
        # render() would draw the action on it.
        return np.ascontiguousarray(self.env._render())

    def close(self):
        """End pygame's part."""
        self.env.close()
