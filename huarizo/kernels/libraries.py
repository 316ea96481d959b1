"""All kernels that training on a CPU uses, compiled at once: for what a run reports and records, and for the doctor."""

from concurrent.futures import ThreadPoolExecutor

from huarizo.kernels import attention, dropout, int8
from huarizo.kernels.build import Library


def libraries(precision: str) -> dict[str, Library | str]:
    """The kernels for a frozen base in this precision, by name; a reason stands for one that there is not.

    Those that aren't in the cache are compiled at the same time.
    """
    kernels = {"attention": attention, "dropout": dropout} | ({"int8": int8} if precision == "int8" else {})
    with ThreadPoolExecutor() as pool:
        return dict(zip(kernels, pool.map(lambda kernel: kernel.library(), kernels.values()), strict=True))
