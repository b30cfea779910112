"""What the package makes of a damaged checkpoint, and whether that is right.

refused         one exception of a kind that is documented, its message one sentence
correct         exactly what the undamaged files hold
undetectable    something else, and exactly what the damaged files say: read again here by other means
wrong           anything else; also what takes long, much memory, or runs code
"""

import contextlib
import dataclasses
import itertools
import json
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from adjoint_jax import checkpoints, pipelines
from adjoint_jax.checkpoints import _models, _pipeline, lora

from . import reader, subjects
from .case import Case

KINDS = (ValueError, OSError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
LONGEST, SECONDS, PATIENCE, KIBIBYTES = 3000, 5, 60, 300 * 1024
TEXT = "low lo"
OURS = ("parent", "name", "remat", "with_projection")
CLASSES = {"UNet2DModel": "UNet2D", "UNet2DConditionModel": "UNet2DCondition", "DiTTransformer2DModel": "DiT",
           "SD3Transformer2DModel": "SD3Transformer",
           "CLIPTextModel": "CLIPText", "CLIPTextModelWithProjection": "CLIPText", "CLIPVisionModel": "CLIPVision",
           "CLIPVisionModelWithProjection": "CLIPVision", "CLIPModel": "CLIP", "Transformer2DModel": "DiT"}  # fmt: skip


class Verdict(NamedTuple):
    """What came of a mutation, and of what is wrong why."""

    word: str
    why: str


class Hung(BaseException):
    """The reading took too long."""


class Network(NamedTuple):
    """A loaded network: its module and its arrays by path."""

    module: Any
    arrays: dict[str, np.ndarray]


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[key].shape == b[key].shape and a[key].tobytes() == b[key].tobytes() for key in a)


def same_shapes(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return {key: x.shape for key, x in a.items()} == {key: x.shape for key, x in b.items()}


def narrow(tensor: np.ndarray, dimensions: int) -> np.ndarray:
    """A tensor without the window of a 1x1 convolution where it has one too many."""
    return tensor.reshape(tensor.shape[:dimensions]) if tensor.ndim > dimensions else tensor


def frozen(value: Any) -> Any:
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def agrees(module: Any, config: dict[str, Any], hint: Any = None) -> str:
    """Where a module is not what its configuration says; empty where it is."""
    named = config.get("_class_name", (config.get("architectures") or [hint])[0])
    if CLASSES.get(named, named) != type(module).__name__:
        return f"the class {named!r} became {type(module).__name__}"
    fields = {field.name: field.default for field in dataclasses.fields(module) if field.init and field.name not in OURS}
    for name, default in fields.items():
        wanted = frozen(config.get(name, default))
        if repr(wanted) != repr(getattr(module, name)) and not (name.endswith("block_types") and "UNetRes" in str(wanted)):
            return f"{name}={str(wanted)[:40]} became {str(getattr(module, name))[:40]}"
    family = _models.family_of(module)
    known = {*fields, *family.ignored, *family.fixed, "architectures", "model_type"}
    strange = [name for name in config if name not in known and not name.startswith("_")]
    return f"{strange[0]!r} was passed over" if strange else ""


def places(tensors: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Where each tensor of a file went, and how its axes turned, learnt from undamaged ones: their values are random."""
    by_bytes = {}
    for path, array in arrays.items():
        for axes in itertools.permutations(range(array.ndim)):
            turned = array.transpose(axes)
            by_bytes.setdefault((turned.shape, turned.tobytes()), (path, tuple(int(i) for i in np.argsort(axes))))
    found = {
        name: by_bytes.get((tensor.shape, tensor.tobytes())) or by_bytes.get((tensor.shape[:2], tensor.tobytes())) for name, tensor in tensors.items()
    }
    return {name: place for name, place in found.items() if place is not None}


class Judge:
    """The subjects below a folder, what they hold undamaged, and the reading of damaged copies."""

    def __init__(self, root: Path):
        self.root, self.known, self.shapes = root, {}, _models.shapes
        _models.shapes = self._shapes  # a tracing takes longer than all the rest
        self.subjects = subjects.build(root / "sound")
        self.sound, self.places = {}, {}
        for subject in self.subjects:
            case = Case(subject, subject.path, np.random.default_rng(0))
            result = self.sound[subject.name] = self.read(case)
            for name, network in result.items():
                if isinstance(network, Network):
                    folder = subject.path / name
                    file = next(iter(sorted(folder.glob("*.safetensors"))))
                    self.places[subject.name, name] = places(reader.read(file), network.arrays)

    def close(self) -> None:
        _models.shapes = self.shapes

    def _shapes(self, module: Any) -> Any:
        for other in subjects.MODULES.values():
            if type(other) is type(module) and repr(other) == repr(module):
                if (key := repr(module)) not in self.known:
                    self.known[key] = self.shapes(module)
                return self.known[key]
        return self.shapes(module)

    def read(self, case: Case) -> dict[str, Any]:
        """What the package reads, as networks and other values by name."""
        subject, folder = case.subject, case.folder
        if subject.kind == "model":
            module, params = checkpoints.load_model(folder, variant=case.variant)
            return {"": Network(module, flat(params))}
        if subject.kind == "lora":
            found = lora.load_lora(folder, subject.modules)
            return {
                "": Network(None, {f"{path}/{key}": np.asarray(leaf) for path, each in found["unet"].items() for key, leaf in each._asdict().items()})
            }
        if subject.kind == "pipeline":
            found = checkpoints.load_pipeline(folder, variant=case.variant)
            result = {name: Network(module, flat(params)) for name, (module, params) in found.components.items()}
            return result | {
                "unknown": found.unknown,
                "scheduler.json": found.scheduler,
                "index.json": found.config,
                "tokenizer.json": sorted(found.tokenizers),
            }
        if subject.kind == "tokenizer":
            return {"tokens": pipelines.tokenize(folder, TEXT)}
        target = self.root / "converted"
        shutil.rmtree(target, ignore_errors=True)
        checkpoints.convert(folder / f"model{case.suffix}", target, **subject.options)
        part = target / "unet" if (target / "unet").is_dir() else target
        module, params = checkpoints.load_model(part)
        return {"": Network(module, flat(params))}

    def verdict(self, case: Case) -> Verdict:
        """Reads a damaged copy and judges."""
        memory, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        word, why = self._verdict(case)
        grown, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory, time.process_time() - began
        if case.marker.exists():
            return Verdict("wrong", "code was run")
        if seconds > SECONDS or grown > KIBIBYTES:
            return Verdict("wrong", f"took {seconds:.1f} s and {grown / 1024:.0f} MiB, and was {word}: {why}")
        return Verdict(word, why)

    def _verdict(self, case: Case) -> Verdict:
        def stop(*_: Any) -> None:
            raise Hung

        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(PATIENCE)
        try:
            result = self.read(case)
        except Hung:
            return Verdict("wrong", "hung")
        except Exception as error:
            return self._sentence(error, case)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        sound = self.sound[case.subject.name]
        if result.keys() == sound.keys() and all(self._equal(result[key], sound[key]) for key in sound):
            return Verdict("correct", "")
        try:
            why = self._explained(case, result, sound)
        except Exception as error:  # of the reader here: the package has read what is not whole
            why = f"it was read, though {error!r}"[:300]
        return Verdict("wrong" if why else "undetectable", why)

    def _sentence(self, error: Exception, case: Case) -> Verdict:
        """Whether an exception says in one sentence what is wrong."""
        text = str(error)
        problems = [] if type(error) in KINDS else [f"a bare {type(error).__name__}"]
        if isinstance(error, ImportError) and "torch" in text:
            problems = []
        problems += [] if text.endswith(".") else ["no full stop"]
        problems += ["more than one line"] if re.search(r"[\x00-\x1f]", text) else []
        problems += [f"{len(text)} letters"] if len(text) > LONGEST else []
        with contextlib.suppress(UnicodeEncodeError):
            text.encode()
            problems += [] if not (case.subject.kind == "convert" and (self.root / "converted").exists()) else ["something was written"]
            return Verdict("wrong" if problems else "refused", f"{', '.join(problems)}: {text[:300]}" if problems else text)
        return Verdict("wrong", f"letters that cannot be printed: {text[:300]!r}")

    def _equal(self, a: Any, b: Any) -> bool:
        if isinstance(a, Network) and isinstance(b, Network):
            return repr(a.module) == repr(b.module) and same(a.arrays, b.arrays)
        return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b

    def _explained(self, case: Case, result: dict[str, Any], sound: dict[str, Any]) -> str:
        """Why a result that is not the undamaged one is not what the files say either; empty where it is."""
        kind, folder = case.subject.kind, case.folder
        if kind == "tokenizer":
            words = json.loads((folder / "vocab.json").read_text())
            tokens = result["tokens"]
            sound_ids = tokens.dtype == np.int32 and tokens.min() >= 0 and tokens.max() < max(max(words.values()) + 8, len(words) + 8)
            return "" if sound_ids and tokens.ndim == 2 and 1 < tokens.shape[1] < 2**16 else f"tokens are {tokens}"[:200]
        index = json.loads((folder / "model_index.json").read_text()) if kind == "pipeline" else {}
        for name, found in result.items():
            if isinstance(found, Network):
                pair = index.get(name)
                if why := self._network(case, name, found, pair[1] if isinstance(pair, list) else None):
                    return f"{name} {why}"
        if kind != "pipeline":
            return ""
        if result["index.json"] != index:
            return "another index"
        named = [name for name in _pipeline.NETWORKS if isinstance(index.get(name), list) and index[name][1] is not None]
        absent = [name for name in named if name not in result and name not in result["unknown"]]
        scheduler = folder / "scheduler" / "scheduler_config.json"
        if result["scheduler.json"] != (json.loads(scheduler.read_text()) if scheduler.exists() else {}):
            return "another scheduler"
        if not scheduler.exists() and isinstance(index.get("scheduler"), list) and index["scheduler"][1] is not None:
            return "the scheduler was left out"
        return f"{absent} was left out" if absent else ""

    def _network(self, case: Case, part: str, found: Network, hint: Any) -> str:
        if odd := [path for path, array in found.arrays.items() if not np.isfinite(array.astype(np.float64)).all()]:
            return f"not finite: {odd[0]}"
        if (
            found.module is not None
            and case.subject.kind != "convert"
            and (why := agrees(found.module, json.loads((case.folder / part / "config.json").read_text()), hint))
        ):
            return why
        expected = dict(self.sound[case.subject.name][part].arrays)
        if not same(found.arrays, expected):
            files = sorted((case.folder / part).glob("*.safetensors"))
            if not files and case.suffix != ".safetensors" and same_shapes(found.arrays, expected):
                return ""  # a pickle whose numbers were changed
            if len(files) != 1:
                return "another file was taken"
            read, header = reader.read(files[0]), reader.header(files[0])
            if odd := [name for name, entry in header.items() if "F" not in entry.get("dtype", "F") and not name.endswith("alpha")]:
                return f"has integers for weights: {odd[0]}"
            places = self.places[case.subject.name, part]
            if case.subject.kind == "lora":  # a layer that is gone whole is no layer
                left = {path.rpartition("/")[0] for name, (path, _) in places.items() if name in read}
                places = {name: place for name, place in places.items() if place[0].rpartition("/")[0] in left}
                expected = {path: array for path, array in expected.items() if path.rpartition("/")[0] in left}
            for name, (path, axes) in places.items():
                expected[path] = narrow(read[name], len(axes)).transpose(axes)
            if case.subject.kind == "lora":
                expected |= self._scales(files[0], read, expected)
        return "" if same(found.arrays, expected) else "holds other numbers than its file"

    def _scales(self, file: Path, read: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The scale of each correction: alpha / rank, alpha of its tensor, or of the metadata."""
        options = json.loads((reader.header(file).get("__metadata__") or {}).get("lora_adapter_metadata", "{}"))
        result = {}
        for path, place in ((path, path.removesuffix("/scale")) for path in expected if path.endswith("/scale")):
            rank = expected[f"{place}/up"].shape[0]
            layer = re.sub(r"_(\d)/", r".\1.", place.removesuffix("/kernel") + "/").replace("/", ".").rstrip(".")
            alpha = read.get(f"unet.{layer}.alpha", options.get("lora_alpha", options.get("unet.lora_alpha")))
            matched = [value for pattern, value in (options.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({pattern})$", layer)]
            alpha = matched[0] if matched else rank if alpha is None else alpha
            root = np.sqrt(rank) if options.get("use_rslora") else rank
            result[path] = np.asarray(jnp.asarray(np.asarray(float(np.asarray(alpha).reshape(())) / root)).astype(jnp.float32))
        return result
