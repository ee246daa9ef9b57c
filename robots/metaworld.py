"""MetaWorld v3 (PyPI metaworld): its tasks, their wordings, cameras, scripted experts.

39 numbers of state, the goal among them; 4 of action: xyz of the hand by 1 cm, gripper. MetaWorld
draws where object and goal are, uniformly from a box of each task (`rand_vec`, 3 or 6 numbers).
Here numpy's generator of the seed draws them anew at each reset, so that other seeds are other
goals. What an environment computes depends on task and seed alone, bit for bit.
"""
import functools
import os
import sys
import warnings

import numpy as np

# Before mujoco is imported: draw without a screen.
if sys.platform == 'linux':
    os.environ.setdefault('MUJOCO_GL', 'egl')

# Mesa's software renderer is the fastest without threads of its own.
os.environ.setdefault('LP_NUM_THREADS', '0')

# task -> class in metaworld.envs, expert in metaworld.policies, wordings
TASKS = {
    'reach': ('SawyerReachEnvV3', 'SawyerReachV3Policy', (
        'reach the goal',
        'move the hand to the target',
        'go to the red point',
        'bring the gripper to the goal',
        'reach the target position',
        'move to the marked point in the air',
        # held out, as are the last three of each task: see robots/simulators.py
        'reach for the target',
        'move the gripper to the red dot',
        'put the hand where the goal is')),
    'push': ('SawyerPushEnvV3', 'SawyerPushV3Policy', (
        'push the puck to the goal',
        'slide the puck to the target',
        'push the object to the green point',
        'move the puck across the table to the goal',
        'shove the puck onto the target',
        'push the puck to the mark',
        # held out
        'slide the object to the goal',
        'push the cylinder to the target',
        'get the puck to the green dot by pushing')),
    'drawer-open': ('SawyerDrawerOpenEnvV3', 'SawyerDrawerOpenV3Policy', (
        'open the drawer',
        'pull the drawer open',
        'pull out the drawer',
        'open the green drawer',
        'pull the handle of the drawer',
        'slide the drawer open',
        # held out
        'get the drawer open',
        'draw the drawer out',
        'make the drawer open')),
    'drawer-close': ('SawyerDrawerCloseEnvV3', 'SawyerDrawerCloseV3Policy', (
        'close the drawer',
        'push the drawer shut',
        'shut the drawer',
        'close the green drawer',
        'push the drawer in',
        'slide the drawer closed',
        # held out
        'get the drawer closed',
        'push in the open drawer',
        'make the drawer shut')),
    'door-open': ('SawyerDoorEnvV3', 'SawyerDoorOpenV3Policy', (
        'open the door',
        'pull the door open',
        'swing the door open',
        'open the door by its handle',
        'pull the handle of the door',
        'open the black door',
        # held out
        'get the door open',
        'turn the door on its hinge',
        'make the door open')),
    'button-press-topdown': ('SawyerButtonPressTopdownEnvV3', 'SawyerButtonPressTopdownV3Policy', (
        'press the button',
        'press the button from above',
        'push the red button down',
        'press down on the button',
        'hit the button',
        'push down the button on the yellow box',
        # held out
        'push the button',
        'press the red button',
        'press the button downwards')),
    'window-open': ('SawyerWindowOpenEnvV3', 'SawyerWindowOpenV3Policy', (
        'open the window',
        'slide the window open',
        'push the window to the side',
        'open the window by its handle',
        'slide the handle of the window',
        'push the window open',
        # held out
        'get the window open',
        'slide the window aside',
        'make the window open')),
    'pick-place': ('SawyerPickPlaceEnvV3', 'SawyerPickPlaceV3Policy', (
        'pick up the puck and bring it to the goal',
        'pick the puck and place it at the target',
        'lift the object to the blue point',
        'grasp the puck and carry it to the goal',
        'take the puck to the target',
        'pick and place the puck',
        # held out
        'grab the puck and lift it to the goal',
        'pick up the object and move it to the target',
        'carry the puck to the blue dot')),
}

# our cameras -> MetaWorld's, and where it is moved to: nearer, as in Masked World Models (Seo et
# al. 2022)
CAMERAS = {'near': ('corner2', (0.75, 0.075, 0.7)), 'hand': ('gripperPOV', ())}


class MetaWorld:
    """A task of MetaWorld v3. size > 0: pictures of the cameras, of those in CAMERAS or of
    MetaWorld's own. Who sees them is told the hand's place and the gripper's, 4 numbers of the 39:
    all else is to be seen. Raises ValueError."""
    proprio_dim, hand_dim, action_dim, fps = 39, 4, 4, 80

    def __init__(self, task, size=0, cameras=('near',), max_steps=500, blind=False):
        from metaworld import envs
        self.task, self.size, self.max_steps, self.renderer = task, size, max_steps, None

        # With the whole state nobody would need to look at a picture.
        if size and not blind:
            self.proprio_dim = self.hand_dim

        # The goal stands in the state, and the bounds of one without would clip it to zero.
        self.env = getattr(envs, TASKS[task][0])()
        self.env._partially_observable = False
        self.env.__dict__.pop('sawyer_observation_space', None)

        # Each reset draws anew, from the generator that the seed began.
        self.env._set_task_called = True
        self.env._freeze_rand_vec = False
        self.env.seeded_rand_vec = True
        self.env.max_path_length = max_steps

        self.cameras = {}
        if size:
            self.place_cameras(cameras)

    def place_cameras(self, names):
        """Fill `cameras`, {name: MetaWorld's}, and move those that have a place of ours."""
        model = self.env.model
        known = [model.camera(i).name for i in range(model.ncam)]
        for name in names:
            theirs, place = CAMERAS.get(name, (name, ()))
            if theirs not in known:
                expected = ', '.join([*CAMERAS, *known])
                raise ValueError(f'camera {name!r}: expected one of {expected}')
            self.cameras[name] = theirs

            # MetaWorld's own stay where they are.
            if place:
                model.camera(theirs).pos = place

    def reset(self, seed, pictures=True):
        """Begin the episode of a seed; its first observation."""
        import mujoco
        self.seed, self.steps = seed, 0
        self.env.seed(seed)
        self.env.reset()

        # MetaWorld moves drawer, window and goal, and looks at where they were. Its observation
        # also has the one before, so that it looks twice.
        mujoco.mj_kinematics(self.env.model, self.env.data)
        self.env._get_obs()
        self.state = self.env._get_obs()

        # What was drawn: place of the object, of the goal.
        self.goal = self.env._last_rand_vec.copy()
        return self.observe(pictures)

    def step(self, action, pictures=True):
        """action (4,) in [-1, 1], clipped. The observation after it, and whether the task is
        done."""
        self.action = np.clip(np.asarray(action, np.float32), -1, 1)
        self.state, _, _, _, info = self.env.step(self.action)
        self.steps += 1
        return self.observe(pictures), bool(info['success'])

    def observe(self, pictures=True):
        """proprio fp32 (P,), pictures {camera: uint8 (size, size, 3)}, instruction, task, seed,
        step; `state`, all that the simulator knows, is for the expert."""
        views = {}
        if pictures:
            views = {name: self.picture(name) for name in self.cameras}
        words = TASKS[self.task][2]
        return dict(proprio=self.state[:self.proprio_dim].astype(np.float32), pictures=views,
                    state=self.state, instruction=words[0], task=self.task, seed=self.seed,
                    step=self.steps)

    def picture(self, camera):
        """uint8 (size, size, 3), the right way up."""
        if self.renderer is None:
            self.renderer = self.open_renderer()
        data, theirs = self.env.data, self.cameras[camera]
        self.renderer.update_scene(data, theirs)
        picture = self.renderer.render()

        # corner and corner2 hang upside-down.
        is_upright = data.camera(theirs).xmat.reshape(3, 3)[2, 1] >= -1e-6
        if not is_upright:
            picture = picture[::-1, ::-1]
        return picture.copy()

    def open_renderer(self):
        """Without shadows, reflections and multisampling: a picture takes 10 ms, not 135."""
        import mujoco
        model = self.env.model
        model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = self.size
        renderer = mujoco.Renderer(model, self.size, self.size)
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return renderer

    def close(self):
        """Give back the renderer's memory, too."""
        if self.renderer is not None:
            self.renderer.close()
        self.renderer = None
        self.env.close()


# -------------------------------------------------------------------------------------------------
# MetaWorld's scripted experts


def expert(observations):
    """A policy for execute=1: actions (N, 1, 4), clipped to [-1, 1]."""
    return np.stack([expert_action(o['task'], o['state']) for o in observations])[:, None]


def expert_action(task, state):
    """(4,) fp32 of the 39 numbers of a state."""
    script = expert_of(task)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')         # that it will be clipped
        return np.clip(script.get_action(state), -1, 1).astype(np.float32)


@functools.cache
def expert_of(task):
    """The script of a task. Raises ValueError."""
    if task not in TASKS:
        raise ValueError(f'task {task!r} has no expert')
    from metaworld import policies
    return getattr(policies, TASKS[task][1])()
