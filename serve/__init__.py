# With this file no module of the same name elsewhere (bench/serve.py) is taken for this folder.
