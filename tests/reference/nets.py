"""The networks whose collectives have formulas, one a mesh overlay, and the bindings that make them."""

import dataclasses

from tests.reference.collectives import Transformer

NET = Transformer(L=4, D=256, H=8, G=4, K=32, F=512, V=2048, B=16, T=128)
MIXTURE = dataclasses.replace(NET, E=8, W=64, J=2)
BINDINGS = (
    f"vocab = {NET.V}",
    f"dim = {NET.D}",
    f"depth = {NET.L}",
    f"heads = {NET.H}",
    f"attention.Attention.kv_heads = {NET.G}",
    f"width = {NET.F}",
    f"experiment.Experiment.batch_size = {NET.B}",
    f"experiment.Experiment.sequence_length = {NET.T}",
    "experiment.Experiment.optimizer = @adamw.AdamW()",
    "stack.Stack.scan = True",
)
SHAPES = {"tensor": "sharding.Mesh.shape = {'tensor': 4}"}
NETS = {
    **dict.fromkeys(("expert", "expert_fsdp"), MIXTURE),
    **dict.fromkeys(("pipeline", "pipeline_fsdp"), dataclasses.replace(NET, M=4)),
    "pipeline_1f1b": dataclasses.replace(NET, M=4, one_f_one_b=True),
}
OVERLAYS = ("data", "fsdp", "hsdp", "hsdp_tp", "tensor", "fsdp_context", *NETS)


def bindings_of(mesh: str) -> list[str]:
    """What makes the network of an overlay out of its family."""
    net, bindings = NETS.get(mesh, NET), [*BINDINGS, *([SHAPES[mesh]] if mesh in SHAPES else [])]
    if net.E:
        bindings += [f"experts.Experts.count = {net.E}", f"expert_width = {net.W}", f"routers.TopK.top_k = {net.J}"]
    return bindings
