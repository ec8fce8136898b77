"""What the shims measure. Nothing of it is in the core, and nothing is imported that is not asked for.

`record`   how one request went, and the meter that a shim runs along with it
`metrics`  records -> Prometheus metrics, and the port that they are scraped from; needs prometheus-client
`loads`    what model servers tell of their queues -> the metric names of GAIE's model-server protocol; needs prometheus-client
`tracing`  a span for each request, its context sent on to the model server; uses opentelemetry-api where it is installed
"""

from .record import MODES, RequestMeter, RequestRecord

__all__ = ["MODES", "RequestMeter", "RequestRecord"]
