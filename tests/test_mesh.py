"""Several devices, in one process and in two: values and gradients are those of one device, and states go from any mesh to any other."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import counting
import effect
import jax
import jax.numpy as jnp
import numpy as np
import on_mesh
import pytest
import stylise
from jax.sharding import PartitionSpec as P
from test_cli import SCHEDULER, UNET, refuses, save_random

from adjoint_jax import cli
from adjoint_jax._options import Guide
from adjoint_jax.experiments import Progress, Run, mesh
from adjoint_jax.experiments.options import read_config
from adjoint_jax.experiments.run import claim
from adjoint_jax.guide import audit, steer

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ("compare_gradients", "effect", "invert_and_edit", "morph_faces", "search_solver", "security_audit", "stylise")
MESHES = ("data=4", "data=2,fsdp=2")
WORDS = ("all-", "reduce-scatter", "collective", "send", "recv")

pytestmark = pytest.mark.usefixtures("as_the_program_runs")


def close(found, expected, tolerance):
    """Each array to a relative error of its norm."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


def words_in_loops(compiled):
    """(how many operations between devices stand in loops, which stand outside)."""
    found = [(looped, each.opcode) for each, _, _, looped in counting.visits(compiled.as_text(), unknown=True) if each.opcode.startswith(WORDS)]
    return sum(looped for looped, _ in found), [opcode for looped, opcode in found if not looped]


REFUSED = {
    "data=8": "--mesh data=8 is of 8 devices, and there are 4 (cpu): give that product.",
    "model=4": "--mesh model=4 has 'model=4' where an axis was expected: give data=8, fsdp=8, or both as in data=4,fsdp=2.",
    "data": "has 'data' where an axis was expected",
    "data=0": "has 'data=0' where an axis was expected",
    "data=2,data=2": "has 'data=2' where an axis was expected",
    "": "has '' where an axis was expected",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refuses_a_mesh(text):
    with pytest.raises(ValueError, match=re.escape(REFUSED[text])):
        mesh.make(text, 8)


def test_refuses_a_batch_that_does_not_divide(tmp_path, capsys):
    path = save_random(tmp_path / "net", UNET, SCHEDULER)
    arguments = ["sample", "--checkpoint", path, "--size", "8", "--batch", "6", "--mesh", "data=4", "--out", tmp_path / "out"]
    refuses(arguments, "A batch of 6 images does not divide over the 4 devices of --mesh data=4: give a multiple of 4.", capsys)
    assert not (tmp_path / "out").exists()


def test_eight_devices_divide_every_config_with_what_the_documentation_adds():
    """The table of docs/mesh.md: each config once, and what is spread over the devices a multiple of eight."""
    rows = re.findall(r"^\| ((?:`\w+` ?)+) \| (?:`(.*)`)? ?\|$", (ROOT / "docs" / "mesh.md").read_text(), re.MULTILINE)
    added = {name: flags.split() for names, flags in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(added) == {file.stem for file in (ROOT / "configs").glob("*.toml")}
    kinds = {"guide": Guide, **{name: importlib.import_module(name).Options for name in EXPERIMENTS}}
    for name, flags in added.items():
        kind = next(kind for start, kind in kinds.items() if name.startswith(start))
        options = dataclasses.asdict(kind(**read_config(str(ROOT / "configs" / f"{name}.toml"), kind)))
        options |= {flag.removeprefix("--").replace("-", "_"): int(value) for flag, value in zip(flags[::2], flags[1::2], strict=True)}
        spread = [options[key] for key in ("batch", "fresh", "held", "gradient_images") if key in options]
        spread += [10 * options["per_class"]] if "per_class" in options else []
        spread += [options["images"]] if name.startswith("search") else []
        assert spread, name
        assert not any(count % 8 for count in spread), (name, spread)
        assert options.get("pairs", 0) % options.get("batch", 1) == 0, name


def test_where_arrays_lie():
    devices = mesh.make("data=2,fsdp=2", 8)
    shapes = {(4, 6, 6): P(None, "fsdp"), (3, 8): P(None, "fsdp"), (3, 5): P(), (): P(), (2, 0): P("fsdp"), (7, 4, 2): P(None, "fsdp")}
    for shape, spec in shapes.items():
        laid = mesh.weights(jnp.ones(shape), devices)
        assert laid.sharding.spec == spec, shape
        np.testing.assert_array_equal(laid, np.ones(shape))
    noise = mesh.batched(jnp.arange(24.0).reshape(3, 8), devices, 1)
    assert {shard.data.shape for shard in noise.addressable_shards} == {(3, 2)}
    assert mesh.words(devices).startswith("4 cpu (data = 2, fsdp = 2) in 1 process")
    tree = {"x": noise, "count": jnp.zeros((), jnp.int32), "host": np.ones(3)}
    assert mesh.together(tree)["count"].sharding.spec == P()
    assert mesh.together(tree)["x"] is noise
    assert mesh.batched(tree, None) is mesh.weights(tree, None) is mesh.everywhere(tree, None) is tree


@pytest.mark.parametrize("text", MESHES)
def test_gradients_in_weights_are_one_sum_after_the_loop(text):
    with jax.enable_x64(True):
        params, variables = on_mesh.inputs(jnp.float64)
        devices, batch, shift = mesh.make(text, 8), {name: variables[name] for name in on_mesh.AXES[1]}, jnp.full(3, 0.1)
        expected = jax.jit(mesh.gradient(on_mesh.objective))(params, shift, batch)
        laid = mesh.weights(params, devices), mesh.everywhere(shift, devices), mesh.batched(batch, devices)
        program = jax.jit(mesh.gradient(on_mesh.objective, devices, on_mesh.AXES)).lower(*laid).compile()
        found = program(*laid)
        close(found, expected, 1e-13)
        assert float(np.linalg.norm(found[1]["odd"])) == 0
    inside, outside = words_in_loops(program)
    assert inside == 0
    assert outside.count("all-reduce") <= 2
    assert outside.count("reduce-scatter") <= outside.count("all-gather") == (0 if text == "data=4" else 4)
    for name, leaf in found[1].items():
        assert leaf.sharding.is_equivalent_to(laid[0][name].sharding, leaf.ndim)


@pytest.mark.parametrize("text", MESHES)
def test_steering_on_a_mesh_is_steering_on_one_device(text):
    with jax.enable_x64(True):
        steering, given, start = on_mesh.laid_out(None)
        expected = list(steer(steering, given, steering.start(start), 2))[-1]
        traces = []
        devices = mesh.make(text, 8)
        steering, given, start = on_mesh.laid_out(devices)
        metric = jax.tree_util.Partial(lambda *args: (traces.append(1), on_mesh.score(*args))[1], *given.metric.args)
        begun = steering.start(start)
        found = list(steer(steering, given._replace(metric=metric), begun, 2))[-1]
        close(
            (found.state.variables, found.state.images, found.state.before),
            (expected.state.variables, expected.state.images, expected.state.before),
            1e-12,
        )
        np.testing.assert_allclose([row["metric"] for row in found.history], [row["metric"] for row in expected.history], rtol=1e-12)
        assert len(traces) == 1
        for leaf, before in zip(jax.tree.leaves(found.state), jax.tree.leaves(begun.state), strict=True):
            assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)
        if text == "data=4":
            inside, outside = words_in_loops(mesh.staying(steering.jitted, begun.state).lower(given, begun.state).compile())
            assert inside == 0
            assert set(outside) <= {"all-gather", "all-reduce"}  # scores and norms are seen by all
            rows = audit(steering.sampler, given, {"first": start}, {"direct": on_mesh.aj.DirectAdjoint()})
            assert max(row.relative_error for _, row in rows) < 1e-12


def save(out, state, steps=1, config=None, **more):
    run = Run(out, config or {"seed": 1}, **more)
    run.save(Progress(state, [{"k": k, "metric": 0.1} for k in range(steps)], [0.5] * steps))
    return run


def state_on(devices):
    """Arrays of several types, in parts and whole."""
    x = np.arange(48, dtype=np.float32).reshape(8, 6) / 7
    spread = {
        "x": mesh.batched(jnp.asarray(x), devices),
        "moment": mesh.weights(jnp.asarray(x, jnp.bfloat16), devices),
        "count": jnp.asarray(3, jnp.int32),
    }
    return mesh.together({**spread, "x again": (mesh.batched(jnp.asarray(x.T), devices, 1),)})


@pytest.mark.parametrize("checkpointer", ["npz", "orbax"])
@pytest.mark.parametrize(("saved", "read"), [("data=4", "data=2,fsdp=2"), ("data=2,fsdp=2", None), (None, "fsdp=4")])
def test_a_state_goes_from_any_mesh_to_any_other(tmp_path, checkpointer, saved, read):
    save(tmp_path / "run", state_on(mesh.make(saved, 8)), 2, checkpointer=checkpointer)
    start = jax.tree.map(lambda leaf: leaf if mesh.of(leaf) is None else mesh.put(0 * leaf, leaf.sharding), state_on(mesh.make(read, 8)))
    restored = Run(tmp_path / "run", {"seed": 1}, resume=True).restore(start)
    assert len(restored.history) == 2
    assert restored.seconds == [0.5, 0.5]
    for found, wanted, place in zip(*(jax.tree.leaves(tree) for tree in (restored.state, state_on(None), start)), strict=True):
        assert found.dtype == wanted.dtype
        assert found.sharding.is_equivalent_to(place.sharding, found.ndim)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_an_orbax_state_is_checked_as_an_archive_is(tmp_path):
    state = {"key": jax.random.key(3), "host": np.asarray([1 / 3, 1e300]), "x": jnp.ones(2)}
    out = tmp_path / "run"
    save(out, state, checkpointer="orbax")
    assert not (out / "state.npz").exists()
    restored = Run(out, {"seed": 1}, resume=True).restore(state)
    assert jax.random.key_data(restored.state["key"]).tolist() == jax.random.key_data(state["key"]).tolist()
    np.testing.assert_array_equal(restored.state["host"], state["host"])
    assert restored.state["host"].dtype == np.float64
    with pytest.raises(ValueError, match=r"was started with other values: seed = 1 \(now 2\); give the same to resume"):
        Run(out, {"seed": 2}, resume=True).restore(state)
    for other in ({"x": jnp.ones(3)}, {"x": jnp.ones(2, jnp.int32)}, {"y": jnp.ones(2)}):
        with pytest.raises(ValueError, match=r"state is not the whole state of a run .*(was expected|state/y).*: remove"):
            Run(out, {"seed": 1}, resume=True).restore({**state, **other})
    with pytest.raises(ValueError, match=r"holds a state by orbax, not by npz: leave --checkpointer out to resume it\.$"):
        Run(out, {"seed": 1}, resume=True, checkpointer="npz")
    with pytest.raises(ValueError, match=r"--checkpointer pickle is not known: use one of npz, orbax\.$"):
        Run(tmp_path / "other", {}, checkpointer="pickle")
    with pytest.raises(FileExistsError, match="give another --out, or --resume"):
        Run(out, {"seed": 1})


def test_a_folder_that_is_no_checkpoint_stays(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="to resume from"):
        claim(tmp_path, resume=True)
    assert (tmp_path / "state" / "notes.txt").exists()


def test_the_commands_take_a_mesh(tmp_path, monkeypatch):
    monkeypatch.setattr("adjoint_jax.guide.audit", lambda *_: [])
    path = save_random(tmp_path / "net", UNET, SCHEDULER)
    common = ["--checkpoint", path, "--size", "8", "--steps", "1", "--batch", "4", "--sampler", "ddim"]
    for name, more in {"one": [], "several": ["--mesh", "data=2,fsdp=2"]}.items():
        cli.main(["sample", *common, *more, "--out", str(tmp_path / name)])
    one, several = (dict(np.load(tmp_path / name / "samples.npz")) for name in ("one", "several"))
    close(several, one, 1e-6)
    own = ["--metric", "test_cli:brightness", "--iterations", "1", "--mesh", "data=4", "--checkpointer", "orbax"]
    cli.main(["guide", *common, *own, "--out", str(tmp_path / "guided")])
    assert (tmp_path / "guided" / "before.png").read_bytes() == (tmp_path / "one" / "samples.png").read_bytes()
    assert "| devices | 4 cpu (data = 4, fsdp = 1) in 1 process(es) |" in (tmp_path / "guided" / "report.md").read_text()
    assert not {"mesh", "distributed", "checkpointer"} & set(json.loads((tmp_path / "guided" / "config.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize(("program", "key"), [(stylise, "style"), (effect, "metric")])
def test_tuning_on_a_mesh_is_tuning_on_one_device(tmp_path, program, key):
    network = save_random(tmp_path / "net", UNET.clone(num_class_embeds=5), SCHEDULER)
    common = {"checkpoint": network, "size": 8, "steps": 2, "batch": 4, "iterations": 2, "label": 1}
    own = (
        {"held": 4, "looks": 2, "engines": ("discrete",), "style": "bold"}
        if program is stylise
        else {"fresh": 4, "effects": ("slant:0.3",), "compared": ()}
    )
    for name, more in {"one": {}, "several": {"mesh": "data=2,fsdp=2", "checkpointer": "orbax"}}.items():
        program.main(program.Options(out=str(tmp_path / name), **common, **own, **more))
    several, one = (dict(np.load(tmp_path / name / "final.npz")) for name in ("several", "one"))
    close(several, one, 1e-5)
    rows = ([json.loads(line)[key] for line in (tmp_path / name / "history.jsonl").read_text().splitlines()] for name in ("several", "one"))
    np.testing.assert_allclose(*rows, rtol=1e-5)
    with pytest.raises(ValueError, match="does not divide over the 4 devices"):
        program.main(program.Options(out=str(tmp_path / "odd"), **common, **own | {"held" if program is stylise else "fresh": 6}, mesh="data=4"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run of `on_mesh` on one device, and compiled programs for the others."""
    out = tmp_path_factory.mktemp("reference")
    with jax.enable_x64(True):
        on_mesh.main(out, None)
    return out


def start_process(devices, *arguments, **environment):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_use_fusion_emitters=false"
    flags = flags if jax.__version__.startswith("0.10.") else flags.split()[0]
    told = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_ENABLE_X64": "1",
        "XLA_FLAGS": flags,
        **environment,
    }
    command = [sys.executable, str(ROOT / "tests" / "on_mesh.py"), *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, **told}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process, code=0):
    """The output of a process, which has five minutes."""
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, output
    return output


def assert_same_numbers(out, reference, name):
    """In float64, to 1e-10 of each array's norm: in float32, Adam makes more of a rounding error than 1e-6."""
    with np.load(out / name / "final.npz") as found, np.load(reference / name / "final.npz") as expected:
        close(dict(found), dict(expected), 1e-10)
    rows, wanted = ([json.loads(line) for line in (each / name / "history.jsonl").read_text().splitlines()] for each in (out, reference))
    for row, other in zip(rows, wanted, strict=True):
        np.testing.assert_allclose(row["per_image"], other["per_image"], rtol=1e-10)


def steps(out):
    return sorted(step.name for step in (out / "steered" / "state").iterdir() if step.name.isdecimal())


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run on eight devices of one process that fitted, and was killed while orbax wrote its second state of steering."""
    out = tmp_path_factory.mktemp("killed")
    ended(start_process(8, out, "data=4,fsdp=2", "steered", "3.orbax"), -signal.SIGKILL)
    return out


def test_eight_devices_give_the_numbers_of_one(reference, killed):
    assert_same_numbers(killed, reference, "fitted")


def two_processes(out, text):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    for process in [start_process(2, out, text, **shared, JAX_PROCESS_ID=str(i)) for i in range(2)]:
        ended(process)


def test_two_processes_go_on_where_eight_devices_were_killed_and_give_the_numbers_of_one(reference, killed, tmp_path):
    assert len(steps(killed)) == 1
    shutil.copytree(killed / "steered", tmp_path / "steered")
    two_processes(tmp_path, "data=2,fsdp=2")
    assert steps(tmp_path) == ["3"]
    for name in ("fitted", "steered"):
        assert_same_numbers(tmp_path, reference, name)
        assert {file.name for file in (tmp_path / name).iterdir()} == {"state", "final.npz", "history.jsonl", "config.json"}


@pytest.mark.slow
def test_eight_devices_go_on_to_the_same_bits(killed, tmp_path):
    shutil.copytree(killed / "steered", tmp_path / "killed" / "steered")
    for name in ("killed", "unbroken"):
        ended(start_process(8, tmp_path / name, "data=4,fsdp=2"))
    for name in ("final.npz", "history.jsonl"):
        assert (tmp_path / "killed" / "steered" / name).read_bytes() == (tmp_path / "unbroken" / "steered" / name).read_bytes()


def test_what_a_kill_left_of_the_first_state_is_forgotten(tmp_path):
    save(tmp_path, state_on(None), checkpointer="orbax")
    (tmp_path / "state" / "1").rename(tmp_path / "state" / "1.orbax-checkpoint-tmp")
    for name in ("history.jsonl", "config.json"):
        (tmp_path / name).unlink()
    claim(tmp_path, resume=True)
    assert not any(tmp_path.iterdir())
