"""launch/: the scripts against stand-ins of what they call, the files against their schemas."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
TPU_VM, SLURM = LAUNCH / "tpu_vm.sh", LAUNCH / "slurm.sbatch"
ARGUMENTS = ["--config=esvit_swin", "--config.data.name=folder:/my 'own' photos;$HOME\n", "*"]

# Two hosts and a queue: a request is served at the second look, and is lost with its hosts when
# `state` says SUSPENDED.
GCLOUD = """
printf '%.300s\\n' "${*//$'\\n'/ }" >>"$CLOUD/calls"
state=$(cat "$CLOUD/state" 2>/dev/null || true)
command=
for word in "$@"; do
  case $word in --command=*) command=${word#--command=} ;; --worker=*) worker=${word#*=} ;; esac
done
case "$2 $3 $4" in
  'tpus queued-resources describe') # moves on after each look
    [[ $state ]] && echo "$state"
    case $state in
      WAITING_FOR_RESOURCES) echo ACTIVE >"$CLOUD/state" ;;
      '') exit 1 ;;
    esac ;;
  'tpus queued-resources create') echo WAITING_FOR_RESOURCES >"$CLOUD/state"
    mkdir "$CLOUD/host0" "$CLOUD/host1" ;;
  'tpus queued-resources delete') rm -r "$CLOUD/state" "$CLOUD"/host? ;;
  'tpus tpu-vm scp') cp "$5" "$CLOUD/host0/"; cp "$5" "$CLOUD/host1/" ;;
  'tpus tpu-vm ssh')
    [[ $state == ACTIVE ]] || exit 255
    [[ $worker == all ]] && workers=(1 0) || workers=("$worker")
    for i in "${workers[@]}"; do cd "$CLOUD/host$i"; bash -c "$command"; done ;;
  *) echo "gcloud: $*" >&2; exit 2 ;;
esac
"""
# On a host: uv "installs" a training that is preempted the first time, and ends the second.
PYTHON3 = """
case "$*" in
  '-m pip'*) ;;
  '-m uv venv'*) mkdir -p esvit_venv/bin ;;
  '-m uv pip'*) cp "$CLOUD/esvit" esvit_venv/bin/esvit ;;
esac
"""
ESVIT = """
[[ $PWD == */host0 ]] || exit 0
printf '%s\\0' "$@" >>"$CLOUD/trained"
ls -A esvit_jax >"$CLOUD/copied"
cat esvit_jax/setup.py >>"$CLOUD/copied"
if [[ ! -e $CLOUD/preempted ]]; then
  echo SUSPENDED >"$CLOUD/state"
  touch "$CLOUD/preempted"
  exit 0 # as after a signal
fi
echo "it ends"
exit 3
"""
TMUX = """
case "$1" in
  has-session) exit 1 ;;
  new-session) bash -c "$5" ;;
esac
"""


def tool(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text("#!/usr/bin/env bash\nset -euo pipefail\n" + text)
    path.chmod(0o755)


@pytest.fixture(name="cloud")
def _cloud(tmp_path):
    """A folder of stand-ins, with what they remember."""
    for name, text in (("gcloud", GCLOUD), ("python3", PYTHON3), ("tmux", TMUX), ("esvit", ESVIT)):
        tool(tmp_path, name, text)
    return tmp_path


@pytest.fixture(name="tpu_vm")
def _tpu_vm(tmp_path_factory):
    """The script in a repository of its own, with a change and files that are not tracked."""
    root = tmp_path_factory.mktemp("repository")
    (root / "launch").mkdir()
    shutil.copy(TPU_VM, root / "launch")
    (root / "setup.py").write_text("old")
    git = ["git", "-C", root, "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    (root / "setup.py").write_text("new")
    (root / ".venv").mkdir()
    (root / ".venv" / "python").touch()
    return root / "launch" / "tpu_vm.sh"


def launch(script, *arguments, folder, **variables):
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.run(
        [script, *arguments], env=os.environ | {"PATH": path, "CLOUD": str(folder)} | variables,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_preempted_slice_is_asked_for_again(cloud, tpu_vm):
    run = launch(tpu_vm, "run", *ARGUMENTS, folder=cloud, WAIT="0")
    assert run.returncode == 3, run.stderr
    assert "it ends" in run.stdout
    assert "the training ended with status 3" in run.stdout
    calls = (cloud / "calls").read_text()
    assert len(re.findall("queued-resources create esvit .*--spot", calls)) == 2
    assert len(re.findall("queued-resources delete", calls)) == 1
    once = ["train", "--distributed", *ARGUMENTS, ""]
    assert (cloud / "trained").read_text() == "\0".join(once) * 2  # quotes and all
    assert (cloud / "copied").read_text().split() == ["launch", "setup.py", "new"]


def test_what_is_there_is_not_done_again(cloud, tpu_vm):
    (cloud / "preempted").touch()
    for _ in range(2):
        assert launch(tpu_vm, "run", folder=cloud, WAIT="0").returncode == 3
    assert (cloud / "calls").read_text().count("queued-resources create") == 1
    tool(cloud, "tmux", "exit 0")  # a training runs
    for command in ("install", "start"):
        assert launch(tpu_vm, command, folder=cloud).returncode == 0
    assert (cloud / "trained").read_text() == "train\0--distributed\0" * 2
    for _ in range(2):
        assert launch(tpu_vm, "delete", folder=cloud).returncode == 0
    assert (cloud / "calls").read_text().count("queued-resources delete") == 1


def test_an_install_that_fails_is_given_up(cloud, tpu_vm):
    tool(cloud, "python3", "exit 1")
    run = launch(tpu_vm, "run", folder=cloud, WAIT="0", TRIES="3")
    assert run.returncode == 1 and run.stderr.endswith("could not be started 3 times in a row\n")
    assert (cloud / "calls").read_text().count("tpu-vm scp") == 3
    assert not (cloud / "trained").exists()


def test_dry_runs_do_nothing(cloud, tpu_vm):
    before = sorted(cloud.iterdir())
    run = launch(tpu_vm, "--dry-run", "run", *ARGUMENTS, folder=cloud, SPOT="false", NAME="x")
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and sorted(cloud.iterdir()) == before
    assert lines[0] == (
        "gcloud compute tpus queued-resources create x --node-id=x --zone=us-west4-a "
        "--accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite "
    )
    assert [line.split()[4] for line in lines[2:]] == ["scp", "ssh", "ssh", "ssh"]
    run = launch(LAUNCH / "multi_gpu.sh", "--dry-run", "--workdir=a b", folder=cloud, GPUS="0,1")
    environment = "env XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 CUDA_VISIBLE_DEVICES=0\\,1 "
    assert run.stdout.splitlines() == [
        environment + f"python3 -m esvit_jax {name} --workdir=a\\ b "
        for name in ("doctor", "train")
    ]
    run = launch(SLURM, "--dry-run", "--workdir=a b", folder=cloud, PYTHON="python")
    assert run.stdout == (
        "srun --kill-on-bad-exit=1 python -m esvit_jax train --distributed --workdir=a\\ b \n"
    )


def test_a_wrong_command_is_one_line(cloud, tpu_vm):
    run = launch(tpu_vm, "trian", folder=cloud)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert "launch/tpu_vm.sh [--dry-run] COMMAND" in launch(tpu_vm, folder=cloud).stdout


@pytest.mark.parametrize(("status", "requeued"), [(0, True), (3, False)])
def test_slurm_queues_again_what_has_saved(tmp_path, status, requeued):
    tool(
        tmp_path, "srun",
        f'trap "sleep 0.3; exit {status}" TERM\ntouch {tmp_path}/started\n'
        "while true; do sleep 0.05; done",
    )  # fmt: skip
    tool(tmp_path, "scontrol", f'echo "$@" >{tmp_path}/queued')
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = subprocess.Popen([SLURM], env=os.environ | {"PATH": path, "SLURM_JOB_ID": "77"})
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    job.send_signal(signal.SIGTERM)  # while it saves
    assert job.wait(60) == status
    assert (tmp_path / "queued").exists() == requeued
    if requeued:
        assert (tmp_path / "queued").read_text() == "requeue 77\n"


def test_slurm_leaves_a_finished_run(tmp_path):
    tool(tmp_path, "srun", "exit 0")
    tool(tmp_path, "scontrol", f"touch {tmp_path}/queued")
    assert launch(SLURM, folder=tmp_path, SLURM_JOB_ID="77").returncode == 0
    assert not (tmp_path / "queued").exists()


def job_set(name):
    """The JobSet, its Job's spec, and its pod's."""
    document = yaml.safe_load((LAUNCH / "gke" / name).read_text())
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and document["kind"] == "JobSet"
    assert set(document["spec"]) <= {"failurePolicy", "network", "replicatedJobs"}
    assert set(document["spec"]["failurePolicy"]) == {"maxRestarts"}
    assert set(document["spec"].get("network", {})) <= {
        "enableDNSHostnames", "publishNotReadyAddresses",
    }  # fmt: skip
    [hosts] = document["spec"]["replicatedJobs"]
    assert set(hosts) == {"name", "replicas", "template"}
    return document, hosts["template"]["spec"], hosts["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", ["tpu.yaml", "gpu.yaml"])
def test_job_sets(name):
    document, job, pod = job_set(name)
    # One process that fails must end all, and only the set starts again.
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert document["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert job["parallelism"] == job["completions"] > 1
    assert pod["terminationGracePeriodSeconds"] > 60
    [container] = pod["containers"]
    assert container["args"][0] == "train"
    assert any(a.startswith("--workdir=gs://") for a in container["args"])
    validate = pytest.importorskip("kubernetes_validate")
    metadata = {"name": "esvit-hosts-0"}
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job}
    validate.validate(json.loads(json.dumps(whole)), "1.31", strict=True)


def test_tpu_pods_are_the_hosts_of_the_topology():
    _, job, pod = job_set("tpu.yaml")
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    per_host = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == chips / per_host


def test_gpu_pods_meet_at_the_first_one():
    document, job, pod = job_set("gpu.yaml")
    arguments = pod["containers"][0]["args"]
    name, hosts = document["metadata"]["name"], document["spec"]["replicatedJobs"][0]["name"]
    assert f"--coordinator={name}-{hosts}-0-0.{name}:8482" in arguments
    assert f"--num_processes={job['parallelism']}" in arguments


def test_sky():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    for part in ("setup", "run"):
        variables = set(re.findall(r"\$\{?([A-Z_]+)", task[part]))
        assert {name for name in variables if not name.startswith("SKYPILOT_")} <= set(task["envs"])
        subprocess.run(["bash", "-n", "-c", task[part]], check=True)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="the extra dev brings it")
def test_scripts_are_clean():
    subprocess.run(["shellcheck", *LAUNCH.glob("*.sh"), SLURM], check=True)
