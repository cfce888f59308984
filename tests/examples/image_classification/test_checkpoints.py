"""Checkpoints: which stay, what comes back, damage, full disks."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.image_classification.checkpoints import (
    CheckpointError,
    Checkpoints,
    checksum,
)

# Coroutines that were waiting for other arrays when one could not be read.
LEFT_BY_ORBAX = "ignore::pytest.PytestUnraisableExceptionWarning"
ROOT = Path(__file__).parents[3]
STATE = {
    "kernel": jax.random.normal(jax.random.key(0), (64, 33)),
    "step": jnp.int32(7),
    "list": [jnp.arange(5, dtype=jnp.uint8)],
}


def saved(folder, accuracies, state=STATE):
    checkpoints = Checkpoints(folder, keep=2)
    for step, accuracy in enumerate(accuracies):
        checkpoints.save(step, state, {"outputs": [[0.1, 1e-300]]}, accuracy)
    checkpoints.wait()
    return checkpoints


def test_the_latest_and_the_best_stay(tmp_path):
    checkpoints = saved(tmp_path, [0.1, 0.9, 0.3, 0.8, 0.2])
    assert {p.name for p in tmp_path.iterdir()} == {"1", "3", "4"}
    assert checkpoints.best() == 1
    assert checkpoints.latest() == tmp_path / "4"
    # One without an accuracy, from the middle of an epoch, is not the best.
    checkpoints.save(5, STATE, {}, None)
    checkpoints.wait()
    assert checkpoints.best() == 1
    assert {p.name for p in tmp_path.iterdir()} == {"1", "4", "5"}
    checkpoints.close()


def test_state_and_record_come_back_bit_for_bit(tmp_path):
    saved(tmp_path, [0.5, 0.1]).close()
    again = Checkpoints(tmp_path, keep=2)
    state, record = again.restore(jax.eval_shape(lambda: STATE))
    again.close()
    jax.tree.map(np.testing.assert_array_equal, state, STATE)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(
        lambda x: x.dtype, STATE
    )
    assert record == {"outputs": [[0.1, 1e-300]]}


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new", keep=1)
    assert checkpoints.restore(STATE) is None
    assert checkpoints.latest() is None
    checkpoints.close()


def test_half_written_checkpoints_are_no_checkpoints(tmp_path):
    saved(tmp_path, [0.5]).close()
    (tmp_path / "1.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "1.orbax-checkpoint-tmp" / "state").write_text("half")
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest() == tmp_path / "0"
    again.save(1, STATE, {}, 0.1)
    again.close()
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def data_files(folder):
    """Every file that holds something, but for those that only mark success."""
    names = {"commit_success.txt", "_sharding", "array_metadatas", "process_0"}
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not names & {path.name, path.parent.name}
    )


@pytest.mark.filterwarnings(LEFT_BY_ORBAX)
def test_damage_is_noticed_wherever_it_is(tmp_path):
    """Each file in turn is cut short, and each is changed in the middle."""
    saved(tmp_path, [0.5]).close()
    errors = []
    for path in data_files(tmp_path / "0" / "state"):
        whole = path.read_bytes()
        middle = len(whole) // 2
        for damaged in (
            whole[:middle],
            whole[:middle] + bytes([whole[middle] ^ 0x10]) + whole[middle + 1 :],
        ):
            path.write_bytes(damaged)
            again = Checkpoints(tmp_path, keep=2)
            try:
                state, _ = again.restore(STATE)
            except CheckpointError as error:
                errors.append(str(error))
            else:  # what was hit does not matter
                jax.tree.map(np.testing.assert_array_equal, state, STATE)
            again.close()
        path.write_bytes(whole)
    assert len(errors) >= 3
    for error in errors:
        assert str(tmp_path / "0") in error
        assert "Delete that folder" in error


def test_the_checksum_sees_values_names_shapes_and_dtypes():
    tree = {"a": jnp.arange(6.0), "b": jnp.zeros(6)}
    others = [
        tree | {"a": jnp.arange(6.0).at[5].set(5.5)},
        {"a": tree["b"], "b": tree["a"]},
        tree | {"a": jnp.arange(6.0).reshape(2, 3)},
        tree | {"b": jnp.zeros(6, jnp.int32)},
    ]
    assert checksum(tree, {}) == checksum(jax.tree.map(np.asarray, tree), {})
    assert len({checksum(other, {}) for other in [tree, *others]}) == 5


@pytest.mark.filterwarnings(LEFT_BY_ORBAX)
def test_a_flipped_bit_of_the_record_is_noticed(tmp_path):
    """One bit of every third byte, of names, values, and the checksum itself."""
    saved(tmp_path, [0.5]).close()
    again = Checkpoints(tmp_path, keep=2)
    path = tmp_path / "0" / "record" / "metadata"
    whole = path.read_bytes()
    bits = np.random.default_rng(0).integers(0, 8, len(whole))
    errors = []
    for k, bit in [*enumerate(bits)][::3]:
        damaged = whole[k] ^ (1 << int(bit))
        path.write_bytes(whole[:k] + bytes([damaged]) + whole[k + 1 :])
        try:
            _, record = again.restore(STATE)
        except CheckpointError as error:
            errors.append(str(error))
        else:  # a space that has become another
            assert record == {"outputs": [[0.1, 1e-300]]}
    again.close()
    assert len(errors) > 0.8 * len(whole) / 3
    assert all(str(tmp_path / "0") in error for error in errors)


@pytest.mark.parametrize(
    "damaged",
    [b"", b'{"acc', b"\xff", b"[1]", b'{"bccuracy": 0.9}', b'{"accuracy": NaN}'],
)
def test_damaged_accuracies_are_named_and_the_run_goes_on(damaged, tmp_path, capsys):
    saved(tmp_path, [0.9, 0.1, 0.2]).close()
    (tmp_path / "0" / "metrics" / "metrics").write_bytes(damaged)
    again = Checkpoints(tmp_path, keep=2)
    assert (
        f"{tmp_path / '0' / 'metrics' / 'metrics'} is damaged"
        in capsys.readouterr().err
    )
    state, _ = again.restore(STATE)
    jax.tree.map(np.testing.assert_array_equal, state, STATE)
    assert again.best() == 2
    again.save(3, STATE, {}, 0.15)
    again.close()
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}


@pytest.mark.filterwarnings(LEFT_BY_ORBAX)
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("saving", [False, True])
def test_a_folder_that_is_moved_or_deleted_is_named(saving, again, tmp_path):
    """While it is written to, or later; another folder may have taken its place."""
    folder = tmp_path / "run" / "checkpoints"
    checkpoints = saved(folder, [0.1])
    if saving:
        checkpoints.save(7, STATE, {}, 0.2)
    (tmp_path / "run").rename(tmp_path / "moved")
    if again:
        folder.mkdir(parents=True, exist_ok=True)  # the writer may have been first
    message = f"{folder} was deleted or moved while"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.save(8, STATE, {}, 0.2)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.close()


@pytest.mark.filterwarnings(LEFT_BY_ORBAX)
def test_damage_to_an_older_checkpoint_does_not_matter(tmp_path):
    saved(tmp_path, [0.9, 0.1]).close()
    for path in data_files(tmp_path / "0"):
        path.write_bytes(path.read_bytes()[:7])
    again = Checkpoints(tmp_path, keep=2)
    state, _ = again.restore(STATE)
    again.close()
    jax.tree.map(np.testing.assert_array_equal, state, STATE)


@pytest.mark.filterwarnings(LEFT_BY_ORBAX)
def test_the_checkpoint_of_another_network_is_refused(tmp_path):
    saved(tmp_path, [0.5]).close()
    again = Checkpoints(tmp_path, keep=2)
    with pytest.raises(CheckpointError, match="cannot be read"):
        again.restore(STATE | {"kernel": jnp.zeros((64, 34))})
    with pytest.raises(CheckpointError, match="cannot be read"):
        again.restore({"kernel": STATE["kernel"]})
    again.close()


def test_a_folder_that_cannot_be_written_is_named():
    with pytest.raises(CheckpointError, match="cannot use /dev/null/checkpoints"):
        Checkpoints(Path("/dev/null/checkpoints"), keep=1)


PROGRAM = """
import resource, signal, sys
from pathlib import Path
import jax.numpy as jnp, numpy as np
from examples.image_classification.checkpoints import CheckpointError, Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
rng = np.random.default_rng(0)
large = {f"w{k}": jnp.asarray(rng.normal(size=10**5)) for k in range(10)}
checkpoints.save(1, {"w": jnp.zeros(3)}, {}, 0.1)
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save(2, large, {}, 0.2)
    checkpoints.wait()
except CheckpointError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_checkpoint_before_stays(tmp_path):
    """A limit on the size of files stands in for a disk that is full."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"cannot write a checkpoint to {tmp_path}" in done.stdout, done.stderr
    assert f"The last complete one is {tmp_path / '1'}" in done.stdout
    assert "File too large" in done.stdout, "behind long names"
    assert not done.stderr, "orbax keeps to itself what its threads raise"
    again = Checkpoints(tmp_path, keep=2)
    state, _ = again.restore({"w": jnp.zeros(3)})
    np.testing.assert_array_equal(state["w"], np.zeros(3))
    again.close()
