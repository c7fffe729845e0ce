"""A prompt becomes a video, in Python: python examples/01_generate.py [OUTPUT]

Uses the demo model that comes with ascendit. For a Wan model give its folder or hub name to `load`,
for example ascendit.load("hf:Wan-AI/Wan2.2-TI2V-5B-Diffusers", device="cuda").
"""

import sys

import ascendit


def main() -> None:
    output = sys.argv[1] if len(sys.argv) > 1 else "outputs/example.mp4"
    pipe = ascendit.load("demo")
    video = pipe.generate(
        "a green square moves down and left on a white background",
        seed=7,
        on_progress=lambda event: print(f"{event.stage} {event.step}/{event.total}"),
    )
    print(video.frames.shape, video.frames.dtype, f"{video.fps} fps")
    print("written", video.save(output, overwrite=True))


if __name__ == "__main__":
    main()
