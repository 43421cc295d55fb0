"""uplinkd: a self-hosted HTTPS access server for IoT devices."""

__version__ = "0.1.0"
