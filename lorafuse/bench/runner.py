"""A variant in this process: its times, on a GPU through CUDA graphs, and its memory."""

import torch

from lorafuse.bench.problem import Variant
from lorafuse.testing.memory import Held, held_bytes
from lorafuse.testing.timing import Clock

__all__ = ["Runner"]


class Runner:
    """Forward and backward of a variant, timed separately.

    On a GPU both are captured into CUDA graphs, so that times are the GPU's and not the host's. `launched` is "", or
    the reason why kernels are launched one by one: the capture failed, or `graphs` is False.
    """

    def __init__(self, variant: Variant, clock: Clock, graphs: bool = True) -> None:
        self.name, self.variant, self.clock = variant.name, variant, clock
        self.launched = ""
        self._graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None
        if clock.cuda:
            self.launched = self._capture() if graphs else "requested"

    def _capture(self) -> str:
        """Capture forward and backward; "" or the reason why that failed."""
        # cuBLAS handles, workspaces and compiled kernels must exist before a capture
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.variant.results()
        torch.cuda.current_stream().wait_stream(side)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(forward, pool=pool):
                outputs = self.variant.forward()
            with torch.cuda.graph(backward, pool=pool):
                self._kept = self.variant.backward(outputs)
        except RuntimeError as error:
            # most often a wait for the device; its launches are timed instead
            return str(error).partition("\n")[0]
        self._graphs = forward, backward
        return ""

    def once(self, warm: bool = False) -> tuple[float, float]:
        """Seconds of one forward and of one backward; `warm`: x and the outputs' gradients were just written."""
        x, douts = ((self.variant.leaves["dx"],), self.variant.douts) if warm else ((), ())
        if self._graphs is not None:
            forward, backward = self._graphs
            return self.clock.time(forward.replay, x)[0], self.clock.time(backward.replay, douts)[0]
        first, outputs = self.clock.time(self.variant.forward, x)
        second, _ = self.clock.time(lambda: self.variant.backward(outputs), douts)  # type: ignore[arg-type]
        return first, second

    def memory(self) -> Held:
        """Bytes of one forward and backward beyond those alive before."""
        return held_bytes(self.variant.forward, self.variant.backward, self.clock.device)
