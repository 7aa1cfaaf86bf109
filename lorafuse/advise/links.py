"""What collectives between devices cost: links within a node and between nodes. A model, not a measurement."""

from dataclasses import dataclass

from lorafuse.plan import DeviceSpec

__all__ = ["Cluster", "Links", "cluster_of", "nodes_for"]

# bytes/s that one device sends while it receives as many, of datasheets: NVLink, else PCIe x16; and the network of one
# device in the usual server: 200 Gbit/s with A100, 400 with H100, H200 and B200 (DGX datasheets)
_NVLINK = {"A100": 300e9, "H100": 450e9, "H200": 450e9, "B200": 900e9}
# GeForce cards copy through the host, which takes each byte twice
_PCIE = {"T4": 16e9, "RTX 3090": 16e9, "RTX 4090": 16e9, "RTX 5090": 32e9}
_NETWORK = {"A100": 25e9, "H100": 50e9, "H200": 50e9, "B200": 50e9}
# devices of the usual server
_PER_NODE = 8
# servers of other GPUs: 100 Gbit/s for all devices of a node, PCIe 4.0 (assumed)
_OTHER_NODE, _OTHER_PCIE = 12.5e9, 32e9
# of a link's rate that collectives reach, and seconds that one takes before it moves anything, within a node and for
# each doubling of nodes (assumed)
_SHARE, _START, _HOP = 0.8, 10e-6, 20e-6


@dataclass(frozen=True)
class Links:
    """Bytes/s that one device sends to others of its node, and to other nodes."""

    within: float
    between: float


@dataclass(frozen=True)
class Cluster:
    """`nodes` of `per_node` devices each. Collectives run in groups of `g` devices in each of `m` nodes."""

    per_node: int
    nodes: int
    links: Links

    @property
    def devices(self) -> int:
        """All of them."""
        return self.per_node * self.nodes

    def all_gather(self, size: float, g: int, m: int, count: float = 1) -> tuple[float, float]:
        """`(bytes that a device sends, seconds)` of gathering `size` bytes in so many collectives; a reduce-scatter is
        the same in the other direction."""
        n = g * m
        within = size * (n - 1) / n / self.links.within if g > 1 else 0.0
        # each node receives what the others hold, through the network of all its devices in the group
        between = size * (m - 1) / m / (g * self.links.between)
        return size * (n - 1) / n, self._seconds(within, between, m, count if n > 1 else 0)

    def all_reduce(self, size: float, g: int, m: int, count: float = 1) -> tuple[float, float]:
        """The same of summing `size` bytes: a reduce-scatter and a gather."""
        sent, seconds = self.all_gather(size, g, m, count)
        return 2 * sent, 2 * seconds

    def all_to_all(self, size: float, g: int, m: int, count: float = 1) -> tuple[float, float]:
        """The same of sending `size` bytes of each device to all evenly."""
        n = g * m
        within, between = size * (g - 1) / n / self.links.within, size * (n - g) / n / self.links.between
        return size * (n - 1) / n, self._seconds(within, between, m, count if n > 1 else 0)

    def _seconds(self, within: float, between: float, m: int, count: float) -> float:
        return max(within, between) / _SHARE + count * (_START + _HOP * (m - 1).bit_length())


def nodes_for(devices: int) -> int:
    """The fewest machines of at most 8 devices that hold so many, as many in each."""
    return next(nodes for nodes in range(-(-devices // _PER_NODE), devices + 1) if devices % nodes == 0)


def cluster_of(device: DeviceSpec, devices: int, nodes: int) -> Cluster:
    """So many devices, a multiple of `nodes`, with the links usual for them."""
    per_node = devices // nodes
    within = _NVLINK.get(device.model, _PCIE.get(device.model, _OTHER_PCIE))
    return Cluster(per_node, nodes, Links(within, _NETWORK.get(device.model, _OTHER_NODE / per_node)))
