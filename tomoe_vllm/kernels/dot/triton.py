"""A block product of float32 weights and hidden states of any float dtype, at least as accurate as float32.

Tensor cores take bfloat16 or tf32, so a float32 weight is split. With bfloat16 hidden states the split loses nothing:
24 bits of a float32 are three bfloat16 of 8 bits each, and a product of two bfloat16 is exact in float32.

    weight = high + middle + low,   weight . x = high . x + middle . x + low . x

float16 hidden states are exact in tf32 (11 bits), and "tf32x3" splits the weight in two: 22 bits. float32 hidden states
take ordinary multiply-adds ("ieee").

Tensor cores truncate their sums where float32 arithmetic rounds them. Over all of D these errors would add up to more
than those of a float32 GEMM (Ootomo and Yokota, arXiv 2203.03341). So each step of the loop sums its own products only,
from zero, the smallest parts first, and is added to the accumulator by an ordinary float32 addition.
"""

import triton
import triton.language as tl


@triton.jit
def add_product(weight, hidden_states, acc):
    """``acc + weight . hidden_states^T``.

    ``weight``: [R, K] float32; ``hidden_states``: [T, K] bfloat16, float16 or float32; ``acc``: [R, T] float32.
    """
    x = tl.trans(hidden_states)
    if hidden_states.dtype == tl.bfloat16:
        high = weight.to(tl.bfloat16)
        rest = weight - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(low, x)
        product = tl.dot(middle, x, product)
        product = tl.dot(high, x, product)
        return acc + product
    elif hidden_states.dtype == tl.float16:
        return acc + tl.dot(weight, x.to(tl.float32), input_precision="tf32x3")
    else:
        return tl.dot(weight, x, acc, input_precision="ieee")
