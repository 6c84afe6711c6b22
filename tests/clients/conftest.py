"""Clients warn of themselves, in other words with every version. What concerns this package stays an error."""

import pytest

FILTERS = (
    'ignore',
    'error:(?s).*timm_ait',  # what it says
    'error:::timm_ait',  # what its lines cause in PyTorch
    'ignore:Using a non-tuple sequence',  # by pytorch-metric-learning, from operations that run inside a tracked tensor
)


def pytest_configure(config: pytest.Config) -> None:
    for line in FILTERS:  # the last one that fits decides
        config.addinivalue_line('filterwarnings', line)
