# What `make demo` runs once .venv is there. MINUTES scales the number of steps; 20 is what the configs say.
set -eu
cd "$(dirname "$0")/.."
case "$MINUTES" in ''|*[!0-9]*|0) echo "MINUTES=$MINUTES: expected a whole number of minutes above 0, such as MINUTES=2" >&2; exit 2;; esac

# A demo of another length is another run: the old one is kept under its length's name.
mkdir -p out
before=$(cat out/demo_minutes 2>/dev/null || echo "$MINUTES")
if [ "$before" != "$MINUTES" ]; then
    for run in siglip_emoji vlm_emoji; do
        if [ -d "out/$run" ]; then
            rm -rf "out/$run.${before}min"
            mv "out/$run" "out/$run.${before}min"
            echo "the demo of $before minutes is kept in out/$run.${before}min"
        fi
        if [ -d "out/$run.${MINUTES}min" ]; then mv "out/$run.${MINUTES}min" "out/$run"; fi
    done
fi
echo "$MINUTES" > out/demo_minutes

"$PY" prepare/emoji.py


# A short demo takes 64 names. Without npm there is one style only, and none that was never trained on.
flags= eval=mix,heldout,fluent-emoji-flat
if [ "$MINUTES" -lt 8 ]; then flags='--data_dir=datasets/emoji_64 --seq_len=14'; fi
if [ ! -d datasets/emoji/fluent-emoji-flat ]; then
    flags="$flags --mix={'openmoji':1.0} --val={'heldout':'heldout'}" eval=mix,heldout
fi
steps() { # max_steps of a config, scaled
    sed -n 's/^max_steps = \([0-9]*\).*/\1/p' "config/$1.py" | awk -v m="$MINUTES" '{s = int($1 * m / 20); print (s > 20 ? s : 20)}'
}

echo; echo "1 of 3: a vision tower learns which picture goes with which name (config/siglip_emoji.py)"
"$PY" train.py config/siglip_emoji.py --max_steps="$(steps siglip_emoji)" $flags

echo; echo "2 of 3: with that tower, a model learns to say the name (config/vlm_emoji.py)"
"$PY" train.py config/vlm_emoji.py --max_steps="$(steps vlm_emoji)" $flags

echo; echo "3 of 3: how many names are right to the letter (mix: pictures trained on; fluent-emoji-flat: a style never seen),"
echo "beside the same model with a blank picture, with another name's picture, and the nearest training picture in 8 x 8 pixels"
"$PY" sample.py --out_dir=out/vlm_emoji --eval="$eval"
echo; echo "see out/vlm_emoji/captions.png, out/vlm_emoji/loss.png and out/vlm_emoji/log.jsonl; try:"
echo "$PY sample.py --out_dir=out/vlm_emoji --image=some.png"
