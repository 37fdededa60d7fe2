import hypothesis
import pytest
import real_cluster

# The same examples in every run, on every machine.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--transfer",
        default="nixl",
        help="the backend that end-to-end tests use where they do not name one",
    )


def pytest_configure(config: pytest.Config) -> None:
    real_cluster.TRANSFER = config.getoption("--transfer")
