"""Muon inside DeepSpeed's ZeRO 1, 2 and 3: our optimizer on the flat partitions that DeepSpeed keeps."""

from muonlm.bridge.deepspeed.checkpoint import load_checkpoint, save_checkpoint
from muonlm.bridge.deepspeed.guards import check_config
from muonlm.bridge.deepspeed.optimizer import DeepSpeedMuon, bind, muon_for_deepspeed

__all__ = ["DeepSpeedMuon", "bind", "check_config", "load_checkpoint", "muon_for_deepspeed", "save_checkpoint"]
