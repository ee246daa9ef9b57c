"""A run that logs to wandb (`wandb_project`), too; train.py imports this for one that does."""
import json
import os
import sys

import parallel


def open_wandb(project, out_dir, settings):
    """A run of wandb; a resumed one goes on under the same id. What wandb refuses ends the
    command."""
    import wandb
    path = os.path.join(out_dir, 'wandb_id')
    if not os.path.exists(path):
        with open(path, 'w', encoding='utf-8') as f:
            json.dump(os.urandom(4).hex(), f)
    with open(path, encoding='utf-8') as f:
        run_id = json.load(f)
    try:
        return wandb.init(project=project, id=run_id, resume='allow', dir=out_dir, config=settings)
    except wandb.Error as error:
        said = ' '.join(str(error).split())
        print(f'train.py: wandb_project={project!r}: {said}: `wandb login`, WANDB_MODE=offline, '
              'or leave it empty', file=sys.stderr)
        parallel.leave(2)
