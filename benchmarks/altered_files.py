"""Images and archives with something wrong about them, for `bench_web.py mutations`."""

from __future__ import annotations

import io
import random
import zipfile


def originals(fields: list[bytes]) -> list[bytes]:
    """Make small images in every format that is read, and archives of them."""
    import cv2
    import numpy as np

    picture = cv2.imdecode(np.frombuffer(fields[0], np.uint8), cv2.IMREAD_COLOR)
    small = cv2.resize(picture, (72, 60), interpolation=cv2.INTER_AREA)
    made = [cv2.imencode(form, small)[1].tobytes() for form in (".jpg", ".png", ".bmp", ".tif")]
    made.append(cv2.imencode(".tif", small.astype(np.uint16) * 257)[1].tobytes())
    made.append(cv2.imencode(".png", cv2.cvtColor(small, cv2.COLOR_BGR2GRAY))[1].tobytes())
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", method) as file:
            for i, data in enumerate(made[:3]):
                file.writestr(f"ward/{i}.img", data)
        made.append(sink.getvalue())
    return made


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Return the bytes with something wrong about them, most often near the head, where the headers are."""
    out = bytearray(data)

    def place() -> int:
        return dice.randrange(min(len(out), 96) if dice.random() < 0.6 else len(out))

    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        if not out:
            break
        match dice.randrange(7):
            case 0:
                out[place()] ^= 1 << dice.randrange(8)
            case 1:
                out[place()] = dice.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                at = place()
                out[at : at + 4] = dice.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\0\0\xff\xff"))
            case 3:
                del out[place() :]
            case 4:
                at = place()
                del out[at : at + dice.randrange(1, 64)]
            case 5:
                at, start = place(), place()
                out[at:at] = out[start : start + dice.randrange(1, 256)]
            case 6:
                at = place()
                out[at : at + 8] = dice.randbytes(8)
    return bytes(out)
