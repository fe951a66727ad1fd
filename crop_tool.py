"""The crop tool, importable from the repository root; its home is `looktwice.rollout.crop_tool`."""

from looktwice.rollout.crop_tool import CropTool as CropTool
