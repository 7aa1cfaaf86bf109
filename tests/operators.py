"""The operators of `lorafuse.ops` by their schemas, on one backend: what autograd calls, without autograd.

Gradients that are not needed are None.
"""

import itertools

import torch

__all__ = ["Experts", "Grouped", "Linear"]


class _Operator:
    def __init__(self, backend):
        self.backend = backend

    @torch.no_grad()
    def _run(self, name, *args):
        return getattr(torch.ops.lorafuse, name)(*args)

    def _gradients(self, name, needs, *args):
        return tuple(grad if need else None for grad, need in zip(self._run(name, *args), needs, strict=True))


class Linear(_Operator):
    """`lora_linear` and `lora_linear_backward`."""

    def forward(self, x, w, bias, a, b, seed, scale, p, wide=False):
        """`(y, xa)`; dropout where there is a seed."""
        return self._run("lora_linear", x, w, bias, a, b, seed, scale, p, self.backend, wide)

    def backward(
        self, dy, x, xa, w, a, b, seed, scale, p, need_dx=True, need_da=True, need_db=True, need_dbias=True, wide=False
    ):
        """`(dx, da, db, dbias)`."""
        needs = [need_dx, need_da, need_db, need_dbias]
        return self._gradients(
            "lora_linear_backward", needs, dy, x, xa, w, a, b, seed, scale, p, needs, self.backend, wide
        )


class Grouped(_Operator):
    """`lora_grouped_linear` and `lora_grouped_linear_backward`."""

    def forward(self, x, offsets, w, bias, a, b, scale, transposed):
        """`(y, xa)`."""
        return self._run("lora_grouped_linear", x, offsets, w, bias, a, b, scale, transposed, self.backend)

    def backward(
        self, dy, x, xa, offsets, w, a, b, scale, transposed, need_dx=True, need_da=True, need_db=True
    ):  # fmt: skip
        """`(dx, da, db)`."""
        needs = [need_dx, need_da, need_db]
        args = dy, x, xa, offsets, w, a, b, scale, transposed, needs, self.backend
        return self._gradients("lora_grouped_linear_backward", needs, *args)


class Experts(_Operator):
    """`lora_experts` and `lora_experts_backward`."""

    def forward(self, *args):
        """`(out, u, xa, ha, order, offsets)`; the arguments are those of the operator before `backend`."""
        return self._run("lora_experts", *args, self.backend)

    def backward(self, *args, needs=(True,) * 6):
        """`(dx, dweight, d up_a, d up_b, d down_a, d down_b)`; the arguments are those before `needs`.

        Both gradients of an adapter come where one is needed.
        """
        dx, dweight, *adapters = needs
        given = dx, dweight, *itertools.chain(*([any(adapters[i : i + 2])] * 2 for i in (0, 2)))
        return self._gradients("lora_experts_backward", given, *args, list(needs), self.backend)
