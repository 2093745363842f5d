"""Layers, losses and optimizers are our own: nothing ready-made of torch, triton or einops is used."""

from __future__ import annotations

import ast
import inspect
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from basic.model import AdamW, ModelConfig, TransformerLM, clip_gradients, cross_entropy
from basic.transformer.kernels.dispatch import use_operators
from tests.project.test_architecture import BASIC, LOCAL, full_module, relative

# Nothing of the FORBIDDEN modules may be used, except the names in ALLOWED.
FORBIDDEN = {
    *("torch.nn", "torch.optim", "torch.distributed.optim", "torch.ops", "torch.special", "torch.distributions"),
    *("torch.masked", "torch.hub", "torch.ao", "torch.quantization"),
    *("torch._C", "torch._VF", "torch._refs", "torch._prims", "torch._decomp", "einops.layers"),
}
ALLOWED = {
    *("torch.nn.Parameter", "torch.nn.Module", "torch.nn.ModuleList", "torch.nn.ModuleDict", "torch.nn.Sequential"),
    *("torch.nn.ParameterList", "torch.nn.ParameterDict", "torch.nn.init.trunc_normal_", "torch.optim.Optimizer"),
    "torch.ops.basic",  # our own operators
    "torch._C._are_functorch_transforms_active",  # a question, which torch answers nowhere else
}
# These may be imported as a whole; every use of their attributes is checked.
IMPORTABLE = {"triton", "einops", "torch", "torch.nn", "torch.nn.init", "torch.nn.parallel", "torch.optim"}

# In all other modules, the functions of torch.nn.functional are forbidden (except the sigmoid, and `unfold`, which
# means something else as a tensor's method), and their variants: backward, private, fused, of a device.
FUNCTIONS = {key for key, value in vars(torch.nn.functional).items() if callable(value) and not inspect.isclass(value)}
FUNCTIONS = {key for key in FUNCTIONS if not key.startswith("_")} - {"sigmoid", "unfold"}
VARIANTS = re.compile(
    r"soft(max|min|plus|sign|shrink)|logsumexp|cross_entropy|nll|kl_div|loss|attention|embedding|dropout|renorm"
    r"|(layer|batch|group|instance|rms|weight|native|legit|spectral)_norm|(^|_)fused_"
    r"|relu|selu|celu|gelu|silu|mish|swish|hardtanh|hardsigmoid|(^|_)(elu|glu|tanh|sdp|lstm|gru|rnn)(_|$)"
)
LOOKUPS = {"getattr", "attrgetter", "methodcaller", "__getattribute__", "__getattr__"}
IMPORTERS = {"import_module", "__import__"}


def is_ready_made(attribute: str) -> bool:
    """Whether torch's attribute of this name is something that this project implements itself."""
    return attribute in FUNCTIONS or VARIANTS.search(attribute) is not None


def is_our_module(call: ast.Call) -> bool:
    """Whether a call imports a module of this project: its first argument is text that begins with "basic."."""
    argument = call.args[0] if call.args else None
    if isinstance(argument, ast.JoinedStr):
        argument = argument.values[0]
    return isinstance(argument, ast.Constant) and str(argument.value).startswith("basic.")


METHODS = {attribute for attribute in dir(torch.Tensor) if is_ready_made(attribute)}


class FromScratch(ast.NodeVisitor):
    """Finds uses of ready-made functions in a source text.

    Every attribute path that starts at an imported name is checked. Methods of tensors are recognized by name, on any
    object except our own modules and `self`.

    Attributes:
        found: a line for each use.
    """

    def __init__(self, source: str):
        self.found: list[str] = []
        self.names: dict[str, str] = {}  # the full path of each imported name
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self.add_imported_names(node)
        self.visit(tree)

    def report(self, node: ast.stmt | ast.expr, what: str) -> None:
        self.found.append(f"line {node.lineno}: {what}")

    def add_imported_names(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.Import):
                path = alias.name
                self.names[alias.asname or path.split(".")[0]] = path if alias.asname else path.split(".")[0]
            else:
                path = f"{full_module(node)}.{alias.name}"
                self.names[alias.asname or alias.name] = path
            if path not in IMPORTABLE:
                self.check_path(node, path)

    def check_path(self, node: ast.stmt | ast.expr, path: str) -> None:
        """Report a full path such as torch.nn.Linear, unless it is allowed."""

        def within(prefixes: set[str]) -> bool:
            return any(path == prefix or path.startswith(prefix + ".") for prefix in prefixes)

        if path.split(".")[0] not in ("torch", "triton", "einops"):
            return
        attributes = path.split(".")[1:]
        if within(ALLOWED):
            return
        if not attributes:
            self.report(node, f"{path} must not be passed around; use its attributes directly")
        elif within(FORBIDDEN) or attributes[-1] == "*":
            self.report(node, f"{path}; allowed are {', '.join(sorted(ALLOWED))}")
        elif any(is_ready_made(name) or (name.startswith("__") and name != "__version__") for name in attributes):
            self.report(node, f"{path} is ready-made; use the function of basic/transformer/functional.py")

    def dotted(self, node: ast.expr) -> list[str] | None:
        """["x", "y", "z"] for x.y.z, with the full path of an imported x; None if it does not start with a name."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id).split(".")
        if isinstance(node, ast.Attribute) and (path := self.dotted(node.value)):
            return [*path, node.attr]
        return None

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self.names:
            self.check_path(node, self.names[node.id])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        root: ast.expr = node
        attributes: list[str] = []
        while isinstance(root, ast.Attribute):
            attributes.insert(0, root.attr)
            root = root.value
        if isinstance(root, ast.Name) and root.id in self.names:
            path = ".".join([self.names[root.id], *attributes])
            self.check_path(node, path)
            if path.startswith("sys.modules."):
                self.report(node, "import modules with an import statement")
            return
        own = isinstance(root, ast.Name) and root.id in ("self", "cls")
        for attribute in attributes[own:]:
            if attribute in METHODS:
                self.report(
                    node, f"the method {attribute} is ready-made; use the function of basic/transformer/functional.py"
                )
        self.visit(root)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if self.dotted(node.value) == ["sys", "modules"]:
            self.report(node, "import modules with an import statement")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = self.dotted(node.func) or [node.func.attr if isinstance(node.func, ast.Attribute) else ""]
        strings = [child.value for arg in node.args for child in ast.walk(arg) if isinstance(child, ast.Constant)]
        if function[-1] in IMPORTERS and not is_our_module(node):
            self.report(node, "import modules with an import statement")
        elif function[-1] in LOOKUPS and METHODS.intersection(strings):
            self.report(node, f"{strings} is looked up by name; write the attribute")
        elif isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "compile"):
            self.report(node, f"{node.func.id} runs code that this test cannot check")
        self.generic_visit(node)


@pytest.mark.parametrize("path", BASIC + LOCAL, ids=relative)
def test_nothing_ready_made_is_used(path: Path) -> None:
    assert FromScratch(path.read_text(encoding="utf-8")).found == []


@pytest.mark.parametrize(
    "snippet",
    [
        # torch.nn and torch.optim, imported in every way
        "import torch.nn as nn\nnn.Linear(2, 2)",
        "import torch\nx = torch.nn.Embedding(2, 2)",
        "from torch import nn\nclass Head(nn.Linear): pass",
        "from torch import nn as layers\nlayers.functional.silu(x)",
        "import torch.nn.functional as F",
        "import torch.nn.functional",
        "from torch.nn import functional",
        "from torch.nn.functional import silu as ours",
        "from torch.nn import Module, RMSNorm",
        "from torch.nn.modules.linear import Linear",
        "from torch.nn.modules.module import Module",
        "from torch.nn.utils import clip_grad_norm_",
        "from torch.nn import init\ninit.normal_(w)",
        "from torch.nn.init import xavier_uniform_",
        "from torch.nn.attention.flex_attention import flex_attention",
        "from torch.nn.parallel import DistributedDataParallel",
        "from torch.optim import AdamW",
        "import torch.optim as optim\noptim.lr_scheduler.CosineAnnealingLR(o, 5)",
        "import torch\nclass Mine(torch.optim.SGD): pass",
        "from torch.distributed.optim import ZeroRedundancyOptimizer",
        "from torch.nn import *",
        "from torch import *",
        "def inside():\n    from torch.nn.functional import softmax",
        # functions outside torch.nn
        "import torch\ntorch.softmax(x, -1)",
        "import torch as t\nsoft = t.softmax",
        "from torch import softmax",
        "from torch import log_softmax as f",
        "import torch\ntorch.special.log_softmax(x, 0)",
        "from torch.special import softmax",
        "import torch\ntorch.sparse.softmax(x, 0)",
        "import torch\ntorch._softmax(x, 0, False)",
        "import torch\ntorch._safe_softmax(x, 0)",
        "import torch\nx - torch.logsumexp(x, 0)",
        "import torch\ntorch.rms_norm(x, (4,))",
        "import torch\ntorch.layer_norm(x, (4,))",
        "import torch\ntorch.native_layer_norm(x, (4,), None, None, 1e-5)",
        "import torch\ntorch._fused_rms_norm(x, (4,), None, 1e-5)",
        "import torch\ntorch.embedding(w, ids)",
        "import torch\ntorch.relu(x)",
        "import torch\ntorch.tanh(x)",
        "import torch\ntorch._foreach_tanh([x])",
        "import torch\ntorch.dropout(x, 0.1, True)",
        "import torch\ntorch.binary_cross_entropy_with_logits(x, y)",
        "import torch\ntorch.nll_loss(x, y)",
        "import torch\ntorch.lstm(x)",
        "import torch\ntorch._scaled_dot_product_flash_attention(q, k, v)",
        "import torch\ntorch._fused_adamw_([p])",
        "import torch\ntorch.ops.aten._softmax(x, 0, False)",
        "import torch\naten = torch.ops.aten",
        "from torch import ops\nops.aten.silu(x)",
        "import torch\ntorch._C._nn.silu(x)",
        "from torch._C import _nn",
        "from torch._C._nn import gelu",
        "import torch\ntorch._VF.embedding(w, i)",
        "from torch._refs import softmax",
        "import torch._refs.nn.functional as R",
        "from torch.distributions import Categorical",
        "from einops.layers.torch import Rearrange",
        "import triton.language as tl\ntl.softmax(x)",
        # methods
        "x.softmax(-1)",
        "(x @ y).log_softmax(dim=-1)",
        "scores[0].relu_()",
        "self.scores.softmax(-1)",
        "map(Tensor.softmax, xs)",
        "from torch import Tensor\nTensor.softmax(x, 0)",
        "from torch import Tensor\nrow = Tensor.logsumexp",
        "import torch\ntorch.Tensor.relu(x)",
        "f(x).mean().tanh()",
        "w.renorm(2, 0, 1.0)",
        # indirectly
        "import torch\nmine = torch\nmine.softmax(x, 0)",
        "import torch\ngetattr(torch, 'soft' + 'max')(x, 0)",
        "import torch\nvars(torch)['softmax']",
        "import torch\ntorch.__dict__['softmax'](x, 0)",
        "from torch import nn\ngetattr(nn, kind)(4, 4)",
        "import torch\nF = torch.nn",
        "getattr(x, 'softmax')(-1)",
        "x.__getattribute__('softmax')(-1)",
        "from operator import methodcaller\nmethodcaller('log_softmax', -1)(x)",
        "import operator\noperator.attrgetter('softmax')(x)",
        "import importlib\nF = importlib.import_module('torch.nn.functional')",
        "from importlib import import_module\nimport_module('torch')",
        "from importlib import import_module\nimport_module(name)",
        "__import__('torch.nn.functional')",
        "import sys\nsys.modules['torch.nn.functional'].silu(x)",
        "import sys\nsys.modules.get('torch')",
        "eval('torch.softmax(x, 0)')",
        "exec(code)",
    ],
)
def test_ready_made_code_is_found(snippet: str) -> None:
    assert FromScratch(snippet).found


@pytest.mark.parametrize(
    "snippet",
    [
        "import torch\nfrom torch import Tensor, nn\nclass A(nn.Module):\n    w: nn.Parameter | torch.Tensor",
        "from torch.nn import Module, ModuleDict, ModuleList, Parameter, ParameterDict, ParameterList, Sequential",
        "from torch.nn.init import trunc_normal_\ntrunc_normal_(w, std=0.02)",
        "from torch.nn import init\ninit.trunc_normal_(w)",
        "import torch.nn as nn\nnn.init.trunc_normal_(w)\nnn.Module.__init__",
        "import torch\nclass AdamW(torch.optim.Optimizer): pass",
        "from torch.optim import Optimizer",
        "from basic.transformer.functional import cross_entropy, silu, softmax\nsoftmax(silu(x), -1)",
        "from basic.transformer import functional\nfunctional.softmax(x, -1)\nfunctional.cross_entropy(x, y)",
        "import basic.transformer.functional as F\nF.silu(F.rms_norm(x, w, 1e-5))",
        "import basic.transformer.functional\nbasic.transformer.functional.softmax(x, 0)",
        "from . import functional\nfunctional.softmax(x, 0)",
        "from .functional import softmax",
        "def softmax(x): return x.exp() / x.exp().sum()\nsoftmax(x)",
        "class A:\n    def softmax(self): ...\n    def f(self): return self.softmax()",
        "import torch\nx * torch.sigmoid(x) + x.sigmoid()",
        "import torch\ntorch.linalg.vector_norm(x), x.norm(), torch._foreach_norm(xs), torch._foreach_mul_(xs, 2)",
        "import torch\ntorch.special_tokens = 1\ntorch.float32, torch.__version__, torch.compile(f), torch.atanh(x)",
        "import torch\ntorch.library.custom_op('basic::flash', f)\ntorch.ops.basic.flash_attention(q, k, v)",
        "from basic.transformer.kernels.flash_attention import flash_attention\nflash_attention(q, k, v)",
        "import torch\ntorch.autograd.Function, torch.utils.checkpoint.checkpoint(f)",
        "import torch.distributed as dist\ndist.init_process_group(), dist.all_reduce(x)",
        "import torch\ntorch.backends.cuda.matmul.allow_tf32 = True\ntorch.multinomial(p, 1)",
        "import triton.language as tl\ntl.exp(x), tl.sigmoid(x), tl.dot(q, k), tl.max(x)",
        "import math\nimport numpy as np\nmath.tanh(x), np.tanh(x), np.logaddexp.reduce(x)",
        "import re\nre.compile('a')\nmodel.eval(), Model().eval()\nx.unfold(0, 2, 1)",
        "import unicodedata\nunicodedata.normalize('NFC', text)\ntext.normalize('NFC')",
        "getattr(self, 'norm'), getattr(config, name), getattr(config, 'dropout', 0), config.attention, config.loss",
        "from operator import itemgetter\nitemgetter('softmax')({})",
        "'torch' in sys.modules, 'torch.softmax', f'{x} like torch.nn.functional.softmax'",
        "import importlib.util\nimportlib.util.find_spec('wandb')",
        "import einops, triton\neinops.rearrange(x, 'a b -> b a'), triton.cdiv(a, b)",
        "from einops import einsum, rearrange\neinsum(x, y, 'a b, b c -> a c')",
    ],
)
def test_our_own_and_harmless_code_passes(snippet: str) -> None:
    assert FromScratch(snippet).found == []


class OperatorRecorder(TorchDispatchMode):
    """Records the name of every operator that PyTorch runs, whatever called it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ffn", ["swiglu", "silu"])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_training_step_runs_on_plain_operators(ffn, kernels) -> None:
    config = ModelConfig(vocab_size=11, context_length=6, d_model=8, num_layers=2, num_heads=2, ffn=ffn)
    ids = torch.randint(11, (2, 7))
    with OperatorRecorder() as operators, nullcontext() if kernels else use_operators(None):
        model = TransformerLM(config)
        optimizer = AdamW(model.parameters())
        cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
    assert ({"bmm", "mm"} if kernels else {"bmm", "exp", "sigmoid", "rsqrt", "addcdiv_"}) <= operators.names
    assert {operator for operator in operators.names if is_ready_made(operator)} == set()
