"""Whose the entries of a model's output are, for what needs no gradients of layers."""

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from tnconv.models.anchors import untouched
from tnconv.models.calls import Call, Pass
from tnconv.models.capture import alone, watching
from tnconv.models.computing import Inputs, arguments
from tnconv.models.operation_graph import Graph
from tnconv.models.sample_maps import Owned, places
from tnconv.models.samples import Samples


def output_places(model: nn.Module, inputs: Inputs, batch_dim: int = 0) -> Tensor:
    """``(n, features)``: where each sample's entries are in the model's flat output.

    Raises:
        NotImplementedError: samples that see each other, or an output that tells none apart.
        TypeError: an output that is no tensor.
    """

    def receive(here: Pass, call: Call, gradient: Tensor) -> None:
        samples.passes.take(call, gradient)

    with (
        watching(model, lambda here: None, receive, True, batch_dim) as watch,
        alone(watch.model, watch),
        untouched(watch.model),
        torch.enable_grad(),
    ):
        samples = Samples(watch)
        args, kwargs = arguments(inputs)
        output = watch.model(*args, **kwargs)
        if not isinstance(output, Tensor):
            raise TypeError(f"the model gives a {type(output).__name__}; expected a tensor")
        here = watch.passes[-1]
        samples.explain(here, Graph([get_gradient_edge(y).node for y in here.outputs]), lambda: [])
        (known,) = here.maps
        if not isinstance(known, Owned):
            raise NotImplementedError(
                f"samples of an output of shape {tuple(output.shape)} cannot be told apart"
            )
        return places(known, tuple(output.shape), here.samples, output.device)
