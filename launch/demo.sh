# What `make demo` runs once .venv is there: it draws pictures, trains a vision tower, trains with
# that tower a model that says what a picture shows, and measures the model.
#
#     make demo [SEED=1] [FULL=1] [MINUTES=2]
#     sh launch/demo.sh result out/vlm_emoji_64/unseen.json       says again what came out
#
# SEED is another run, beside the others. FULL takes 286 names instead of 64. MINUTES makes a run
# shorter: as many steps as fit in it. What is done is not done again: the same command goes on
# where it was stopped.
set -eu
cd "$(dirname "$0")/.."
PY=${PY:-.venv/bin/python}
SEED=${SEED:-0}
FULL=${FULL:-}
MINUTES=${MINUTES:-}

# train.py answers Ctrl-C by saving, and then all is well: the stages after it must not begin.
trap 'exit 130' INT TERM

refuse() {
    echo "launch/demo.sh: $1" >&2
    exit 2
}

# -------------------------------------------------------------------------------------------------
# what came out: a file of one line, as sample.py --json=true writes it

field() { # a file, a name
    found=$(sed -n "s/.*\"$2\": \([0-9.]*\).*/\1/p" "$1")
    if [ -z "$found" ]; then
        refuse "$1 has no $2: expected what sample.py --eval=<a data set> --json=true prints"
    fi
    echo "$found"
}

percent() {
    awk -v share="$1" 'BEGIN { printf "%.1f %%", 100 * share }'
}

beats_pixels() {
    awk -v model="$(field "$1" exact_match)" -v pixels="$(field "$1" nearest_pixels)" \
        'BEGIN { exit !(model > pixels) }'
}

say_result() {
    pictures=$(field "$1" samples)
    right=$(percent "$(field "$1" exact_match)")
    pixels=$(percent "$(field "$1" nearest_pixels)")
    if beats_pixels "$1"; then
        echo "Of $pictures pictures by a designer it never saw it names $right to the letter;" \
            "the nearest training picture in 8 x 8 pixels names $pixels."
        return
    fi

    # What knows less than pixels do is not worth a look.
    remedy='make demo FULL=1 trains for longer on more pictures'
    if [ -n "$FULL" ]; then remedy='another seed is another try: make demo FULL=1 SEED=1'; fi
    if [ -n "$MINUTES" ]; then remedy='make demo without MINUTES runs to the end'; fi
    echo "This run was too short to beat the pixels: of $pictures pictures by a designer it" \
        "never saw it names $right, the nearest training picture in 8 x 8 pixels $pixels; $remedy."
}

if [ "${1:-}" = result ]; then
    say_result "${2:?which file?}"
    exit
fi

# -------------------------------------------------------------------------------------------------
# which run

case "$SEED" in
    *[!0-9]*) refuse "SEED=$SEED: expected a whole number, such as SEED=1";;
esac
case "$FULL" in
    ''|0) FULL=;;
    1) ;;
    *) refuse "FULL=$FULL: expected FULL=1, or nothing";;
esac
case "$MINUTES" in
    *[!0-9]*|0*) refuse "MINUTES=$MINUTES: expected a whole number above 0, such as MINUTES=2";;
esac

# `minutes` is what the steps of the configs are taken to need, with something to spare.
if [ -z "$FULL" ]; then
    names=64 data=emoji_64 suffix=_64 minutes=6 tower_seconds=215 model_seconds=30
else
    names=286 data=emoji suffix= minutes=20 tower_seconds=360 model_seconds=420
fi
tower_config=siglip_emoji$suffix
model_config=vlm_emoji$suffix

# A run of another seed or length has a folder of its own.
if [ "$SEED" != 0 ]; then suffix=${suffix}_seed$SEED; fi
if [ -n "$MINUTES" ]; then suffix=${suffix}_${MINUTES}min; fi
tower=out/siglip_emoji$suffix
model=out/vlm_emoji$suffix

scaled() { # a number of steps or seconds
    echo $(($1 * ${MINUTES:-$minutes} / minutes))
}

stage() { # its number, what happens, its seconds
    printf '\n%s/4 %s: about %s s\n' "$1" "$2" "$3"
}

train() { # a config, its out_dir, more flags
    config=config/$1.py
    out_dir=$2
    steps=$(sed -n 's/^max_steps = \([0-9]*\).*/\1/p' "$config")
    shift 2
    "$PY" train.py "$config" --out_dir="$out_dir" --seed="$SEED" \
        --max_steps="$(scaled "$steps")" "$@"
}

# -------------------------------------------------------------------------------------------------
# the four stages

stage 1 "drawing emoji of six designers, $names names, one designer for the test alone" 30
"$PY" prepare/emoji.py

# Without npm there is one designer: none is left for the test, and what is held out has names that
# were never learned.
if [ ! -d "datasets/$data/fluent-emoji-flat" ]; then
    set -- "--mix={'openmoji':1.0}" "--val={'heldout':'heldout'}"
fi

stage 2 "a vision tower learns which picture has which name (config/$tower_config.py)" \
    "$(scaled $tower_seconds)"
train "$tower_config" "$tower" "$@"

stage 3 "with that tower, a model learns to say the name (config/$model_config.py)" \
    "$(scaled $model_seconds)"
train "$model_config" "$model" --init_from="$tower" "$@"

stage 4 'measuring it: how many names are right to the letter' 15
if [ $# -gt 0 ]; then
    "$PY" sample.py --out_dir="$model" --eval=mix
    echo "There was one designer only, so nothing tells understanding from learning by heart:" \
        "install npm (Node.js), and run make demo again."
    exit
fi

# The one figure that counts comes first: it decides whether there is something to show.
scores=$model/unseen.json
if ! "$PY" sample.py --out_dir="$model" --eval=fluent-emoji-flat --json=true \
    > "$scores" 2> "$model/unseen.log"
then
    cat "$model/unseen.log" >&2
    exit 1
fi
if ! beats_pixels "$scores"; then
    say_result "$scores"
    exit
fi
cat <<'END'
mix: pictures it was trained on; heldout: others of the same designers; fluent-emoji-flat: a
designer it never saw. Beside it the same model with a blank picture, the same with the picture of
another name, and no model: the name of the nearest training picture in 8 x 8 pixels.
END
"$PY" sample.py --out_dir="$model" --eval=mix,heldout,fluent-emoji-flat

echo
say_result "$scores"
echo "Look at $model/captions.png (green: right, red: wrong), then try:"
echo "    $PY sample.py --out_dir=$model --image=<a picture of yours>"
echo "    $PY data.py $model/config.json --show_steps=1:2      # which pictures its first step saw"
if [ -z "$FULL" ]; then
    echo '    make demo FULL=1      # 286 names, about 14 minutes'
else
    echo "    $PY train.py config/t2i_emoji.py      # draws pictures from names, about 30 minutes"
fi
