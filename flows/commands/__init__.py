"""The commands of `superres` besides `upscale` and `probe`, by what they are about."""
