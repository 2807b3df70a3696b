"""The embedded cluster: real servers from package registries, without containers."""

from causemesh.local.cluster import ALL_SERVERS, Cluster, Endpoints, ServerStatus

__all__ = ["ALL_SERVERS", "Cluster", "Endpoints", "ServerStatus"]
