"""ProxConnect and its kin in any training loop: attach to an optimizer, train as always, finish.

weights     what is quantized: targets of a plan, and each parameter under way
checks      what a ProxConnect can be attached to
attached    the two step hooks, and what a run can be asked and told
state       what it is saved as
"""

from pcq.proxconnect.attached import ProxConnect, Telemetry
from pcq.proxconnect.weights import Target, targets

__all__ = ["ProxConnect", "Target", "Telemetry", "targets"]
