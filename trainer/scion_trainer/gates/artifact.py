"""The artifact gate: the stored files are still the published ones, fit this base and respect the server's limits.

Owns nothing but the question; the checks are scion_adapters.preflight's. They ran when the version was published too:
here they run again on the stored bytes, because those are what servers load.
"""

from __future__ import annotations

from scion_adapters.errors import NotFoundError, RejectedError
from scion_adapters.preflight import AdapterLimits, check_adapter
from scion_trainer.gates.types import GateContext, GateResult, Verdict


class ArtifactGate:
    name = "artifact"
    needs_server = False

    def run(self, context: GateContext) -> GateResult:
        version, base = context.version, context.base_info
        if version.base_fingerprint != base.fingerprint:
            return GateResult(
                self.name,
                Verdict.FAIL,
                f"wrong_base: made for {version.base_fingerprint[:19]}, the configured base is {base.fingerprint[:19]}",
            )
        server = context.settings.server
        try:
            context.verify_artifact()
            limits = AdapterLimits(server.max_lora_rank, server.target_modules)
            info = check_adapter(context.artifact(), base, limits, stored=True)
        except RejectedError as error:
            return GateResult(self.name, Verdict.FAIL, f"{error.reason}: {error}")
        except NotFoundError as error:
            return GateResult(self.name, Verdict.FAIL, f"missing: {error}")
        figures = {
            "rank": float(info.rank),
            "parameters": float(info.num_parameters),
            "size_bytes": float(info.size_bytes),
        }
        return GateResult(
            self.name,
            Verdict.PASS,
            "files unchanged, finite, and fit the base",
            figures,
            details={"modules": list(info.modules)},
        )
