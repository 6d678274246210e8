"""Surgery on models: layers replaced in place by compressed ones, with a report of what was done and what was not."""

from effkern._convert_cluster import cluster
from effkern._convert_cluster_report import ClusterReport, Palettized
from effkern._convert_finalize import finalize, restore
from effkern._convert_monarch import Monarchized, MonarchReport, monarchize
from effkern._convert_reversible import Reversed, ReversibleReport, reversible

__all__ = [
    "ClusterReport",
    "MonarchReport",
    "Monarchized",
    "Palettized",
    "Reversed",
    "ReversibleReport",
    "cluster",
    "finalize",
    "monarchize",
    "restore",
    "reversible",
]
