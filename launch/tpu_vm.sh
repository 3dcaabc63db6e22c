#!/usr/bin/env bash
# Trains on a TPU VM slice of Google Cloud, from asking for the slice to deleting it.
#
#   launch/tpu_vm.sh [--dry-run] COMMAND
#
#   run ARGUMENTS…    create, install, start and follow; after a preemption all of it again, until
#                     the training has ended. ARGUMENTS are those of `esvit train`
#   create            asks for the slice and waits until it is there
#   install           copies the tracked files to all hosts, with Python and what is needed
#   start ARGUMENTS…  starts `esvit train` on all hosts, in tmux, so that it outlives this shell
#   follow            shows what host 0 prints until the training ends; returns its exit status
#   delete            gives the slice back
#
# What is there already is not done again, so any of them may be repeated: `run` with the same
# arguments goes on where it was interrupted. --dry-run prints the commands instead.
set -euo pipefail

# Settings, which the environment may change. The project is that of `gcloud config`.
: "${NAME:=esvit}" "${ZONE:=us-west4-a}" "${TYPE:=v5litepod-8}" # esvit plan knows the sizes
: "${SPOT:=true}" # half the price or less, and may be taken away at any time
: "${VERSION:=v2-alpha-tpuv5-lite}" # of the software: v2-alpha-tpuv6e, tpu-ubuntu2204-base (v2 to v4)
: "${PYTHON_VERSION:=3.11}" "${EXTRAS:=tpu,gcs}"
: "${WAIT:=30}" # seconds between two looks at what is not ready
: "${TRIES:=5}" # to start training, before it is given up

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; }

dry_run=false
if [[ ${1:-} == --dry-run ]]; then
    dry_run=true
    shift
fi
tpus=(gcloud compute tpus)
root=$(cd "$(dirname "$0")/.." && pwd)

# Runs a command, or prints it so that a shell could run it.
run() {
    if $dry_run; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# HOSTS COMMAND: runs it in a shell of one host or of all.
remote() {
    run "${tpus[@]}" tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" \
        --ssh-flag=-oServerAliveInterval=30 --command="$2"
}

# What became of the request for the slice; nothing where there is none.
state() {
    "${tpus[@]}" queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)' \
        2>/dev/null || true
}

create() {
    local request=("${tpus[@]}" queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE"
        --accelerator-type="$TYPE" --runtime-version="$VERSION")
    if $SPOT; then
        request+=(--spot)
    fi
    if $dry_run; then
        run "${request[@]}"
        return
    fi
    local now
    while now=$(state) && [[ $now != ACTIVE ]]; do
        echo "the slice $NAME: ${now:-not asked for yet}"
        case $now in
            '') "${request[@]}" || echo "refused; asked again in $WAIT s" ;;
            # Preempted, or never made: it does not come back by itself.
            FAILED | SUSPENDED) delete || echo "not deleted; tried again in $WAIT s" ;;
        esac
        sleep "$WAIT"
    done
}

install() {
    local archive tree
    archive=$(mktemp -d)/esvit_jax.tar.gz
    # Tracked files as they are now, committed or not; no .venv, no runs. Nothing is stashed.
    tree=$(git -C "$root" -c user.name=esvit -c user.email=esvit stash create)
    run git -C "$root" archive --output="$archive" "${tree:-HEAD}"
    run "${tpus[@]}" tpu-vm scp "$archive" "$NAME:esvit_jax.tar.gz" --zone="$ZONE" --worker=all
    rm -rf "$(dirname "$archive")"
    # The images have Python 3.10; uv brings one of its own. A training that runs is left alone.
    remote all "set -e
if tmux has-session -t esvit 2>/dev/null; then exit; fi
rm -rf esvit_jax && mkdir esvit_jax && tar -xzf esvit_jax.tar.gz -C esvit_jax
command -v tmux >/dev/null || sudo apt-get install -qq -y tmux
python3 -m pip install --quiet --user --upgrade uv
python3 -m uv venv --quiet --allow-existing --python=$PYTHON_VERSION esvit_venv
python3 -m uv pip install --quiet --python=esvit_venv/bin/python './esvit_jax[$EXTRAS]'"
}

# The training is a script on each host, so that its arguments are quoted once for it and once for
# the way there. It writes its exit status when it ends.
start() {
    local arguments='' script
    if (($#)); then
        printf -v arguments ' %q' "$@"
    fi
    script="esvit_venv/bin/esvit train --distributed$arguments >>train.log 2>&1
echo \$? >train.status"
    remote all "if ! tmux has-session -t esvit 2>/dev/null; then
rm -f train.status
printf '%s\n' $(printf %q "$script") >train.sh
tmux new-session -d -s esvit 'bash train.sh'
fi"
}

follow() {
    remote 0 "if [ ! -e train.status ]; then
tail -n 20 -F train.log --pid=\$(tmux list-panes -t esvit -F '#{pane_pid}')
else
tail -n 20 train.log
fi
exit \$(cat train.status)"
}

# The exit status of the training; nothing while it runs, or where its host is gone.
outcome() {
    remote 0 'cat train.status 2>/dev/null' 2>/dev/null || true
}

delete() {
    if $dry_run || [[ $(state) ]]; then
        run "${tpus[@]}" queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
    fi
}

train() {
    local ended failures=0
    if $dry_run; then
        create && install && start "$@" && follow
        return
    fi
    while :; do
        create
        if "$0" install && "$0" start "$@"; then # in processes of their own, which errors end
            failures=0
            follow || true # ends with the training, with the connection, or with the slice
            ended=$(outcome)
            sleep "$WAIT" # a preemption, too, ends a training, before the slice is gone
            if [[ $ended && $(state) == ACTIVE ]]; then
                echo "the training ended with status $ended; \`$0 delete\` gives the slice back"
                return "$ended"
            fi
        elif ((++failures == TRIES)); then
            echo "$0: training could not be started $TRIES times in a row" >&2
            return 1
        fi
        echo "the connection is lost; the slice $NAME: $(state)"
        sleep "$WAIT"
    done
}

command=${1:-}
case $command in
    run)
        shift
        train "$@"
        ;;
    start)
        shift
        start "$@"
        ;;
    create | install | follow | delete) $command ;;
    '' | -h | --help) usage ;;
    *)
        echo "$0: $command is no command; there are run, create, install, start, follow, delete" >&2
        exit 2
        ;;
esac
