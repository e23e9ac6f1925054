from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from serving.run import quiet_blas


def test_numpy_has_one_thread_in_the_server() -> None:
    assert np.ones((2, 2)).any()  # its library is loaded
    with threadpool_limits():  # puts back what was
        quiet_blas()
        blas = [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]
    assert blas
    assert set(blas) == {1}
