"""Operations: torch's compiler calls them by name, and they pass torch's own checks."""

import torch

from huarizo.kernels.operations import operation


@operation("test_scaled")
def scaled(x: torch.Tensor, by: float, more: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return x * by, x + (0 if more is None else more)


@torch.library.register_fake("huarizo::test_scaled")
def _(x: torch.Tensor, by: float, more: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def test_an_operation_computes_what_its_function_does():
    x = torch.randn(3, 4)
    doubled, moved = scaled(x, 2.0, torch.ones(4))
    assert torch.equal(doubled, 2 * x)
    assert torch.equal(moved, x + 1)


def test_an_operation_passes_torchs_checks():
    torch.library.opcheck(torch.ops.huarizo.test_scaled.default, (torch.randn(3, 4), 2.0))


def test_the_compiler_sees_an_operation_as_one_node():
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x = torch.randn(3, 4)
    compiled = torch.compile(lambda x: scaled(x, 3.0)[0] + 1, backend=keep)
    assert torch.equal(compiled(x), 3 * x + 1)
    assert torch.ops.huarizo.test_scaled.default in {node.target for node in graphs[0].graph.nodes}
