"""The embedded cluster: real servers from package registries, without containers."""

from causemesh.local.cluster import Cluster, Endpoints, ServerStatus

__all__ = ["Cluster", "Endpoints", "ServerStatus"]
