"""Why a measurement is abandoned."""


class BenchmarkError(Exception):
    """The figures would mean nothing: something did not start, did not answer, or answered wrongly."""
