"""A run in a repository of the Hugging Face hub: its model card, and the way there."""
import json
import os

from tokenizer import read_json


def upload(run, name, folder):
    """Write the card of a run into a folder, and the folder to a repository: where it is. Raises
    ValueError."""
    import huggingface_hub
    # huggingface.co shows it as the page of the repository.
    with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as f:
        f.write(model_card(run, name))
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(name, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message='nanofoundry')
    except Exception as error:
        # Of several libraries: not logged in, no such name, no network.
        reason = ' '.join(str(error).split())[:300]
        raise ValueError(f'{name!r} could not be written ({reason}): is HF_TOKEN set?') from None
    return commit.commit_url


def model_card(run, name):
    """README.md of a pushed run: its command, data, losses and settings."""
    # A folder of a run, or of one of its checkpoints.
    settings = read_json(os.path.join(run, 'config.json'))
    rows = read_log(run)

    # A checkpoint alone does not know its command.
    command = 'train.py'
    environment = os.path.join(run, 'environment.json')
    if os.path.exists(environment):
        command = ' '.join(read_json(environment).get('argv', [command]))

    # The last loss, and the last of each validation set.
    table = []
    trained = [row for row in rows if 'loss' in row]
    if trained:
        table.append(line_of('train', trained[-1]['step'], trained[-1]['loss']))
    # A later row of the same set takes the place of an earlier one.
    validated = {row['val']: row for row in rows if 'val' in row}
    for key, row in validated.items():
        table.append(line_of(key, row['step'], row['val_loss']))

    # What the Hub lists it under.
    tags = {'vlm': 'image-text-to-text', 'llm': 'text-generation',
            'siglip': 'image-feature-extraction'}
    mix = ', '.join(f'{key} ({weight:g})' for key, weight in settings['mix'].items())
    return '\n'.join([
        '---',
        'library_name: transformers',
        f'pipeline_tag: {tags.get(settings["task"], "other")}',
        'tags:',
        '- nanofoundry',
        '---',
        f'# {name.rpartition("/")[2]}',
        '',
        f'Trained with nanofoundry: `python {command}`',
        '',
        f'Data (weight in the mix): {mix}',
        '',
        '| data | step | loss |',
        '| --- | --- | --- |',
        *table,
        '',
        '<details><summary>all settings</summary>',
        '',
        '```json',
        json.dumps(settings, indent=1),
        '```',
        '</details>',
        ''])


def line_of(data_set, step, loss):
    """A row of the table; a loss that was not finite is null in the log."""
    return f'| {data_set} | {step} | {"nan" if loss is None else round(loss, 4)} |'


def read_log(run):
    """The rows of a run's log.jsonl that are whole."""
    path = os.path.join(run, 'log.jsonl')
    if not os.path.exists(path):
        return []
    # A run that is still going may be writing its last one.
    with open(path, encoding='utf-8') as f:
        return [json.loads(line) for line in f if line.endswith('\n')]
