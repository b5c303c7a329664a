"""Frames as they come: files at their own pace, folders, pushed frames, cameras, and streams that the test serves."""

from __future__ import annotations

import contextlib
import http.server
import io
import socket
import threading
import time
import types
from fractions import Fraction

import av
import numpy as np
import pytest
from clips import clip_files, encode, pictures, refused  # noqa: F401
from media_corpus import MATRIX, film, matrix, shown_of
from PIL import Image

from vlmfast.stream import Fps, Uniform, open_source, read_video
from vlmfast.video import live_source
from vlmfast.video.due import DueStamps
from vlmfast.video.frame_index import read_index
from vlmfast.video.live_source import Clock


def times(source, **options):
    return np.array([frame.timestamp for frame in open_source(source, **options)])


# ---------------------------------------------------------------- time


def test_clock_never_stands_still():
    """Whatever the stamps do, time grows; where they only grow, it is exactly theirs."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        clock, stamp, given = Clock(0.04), float(rng.normal(0, 1e4)), []
        for _ in range(40):
            event = rng.random()
            if event < 0.1:
                stamp = float(rng.normal(0, 1e4))  # the camera restarts its clock
            elif event < 0.2:
                clock.away = float(rng.exponential(5))
                stamp = stamp + clock.away if rng.random() < 0.5 else 0.0
            else:
                stamp += float(rng.exponential(0.1))
            given.append(clock(None if rng.random() < 0.1 else stamp))
        assert given[0] == 0 and np.all(np.diff(given) > 0)
    clock, stamps = Clock(1.0), 500 + np.cumsum(rng.exponential(0.3, 50))
    assert np.allclose([clock(s) for s in stamps], stamps - stamps[0])


def test_clock_over_a_lost_connection():
    """The same clock goes on: its own stamps count. Another one: as long passes as we were away."""
    clock = Clock(0.04)
    assert [clock(100.0), clock(100.5)] == [0.0, 0.5]
    clock.away = 2.0
    assert clock(103.5) == 3.5
    clock.away = 2.0
    assert clock(7.0) == 5.5
    assert clock(7.25) == 5.75


# ---------------------------------------------------------------- files, folders, iterables


@pytest.mark.parametrize("name", ["mp4", "mkv", "ts", "avi", "open_mp4", "vfr_mp4", "raw", "gif", "side"])
def test_files_give_what_read_video_gives(clips, name):
    whole = read_video(clips[name], Uniform(10_000))
    frames = list(open_source(clips[name]))
    assert np.array_equal(np.stack([f.image for f in frames]), whole.frames)
    assert np.allclose([f.timestamp for f in frames], whole.timestamps, atol=1e-6)
    some = list(open_source(str(clips[name]), sample_fps=3, size=32))
    chosen = read_video(clips[name], Fps(3), size=32)
    if name != "gif" and not name.startswith("vfr"):  # there the frame on show began a little before the tick
        assert np.allclose([f.timestamp for f in some], chosen.timestamps, atol=1e-6)
        assert np.array_equal(np.stack([f.image for f in some]), chosen.frames)
    assert np.all(np.diff([f.timestamp for f in some]) > 0) and len(some) <= len(chosen) + 1


@pytest.mark.parametrize("name", ["mp4", "mkv", "ts", "open_mp4", "vfr_mp4", "vfr_mkv", "avi", "raw"])
@pytest.mark.parametrize("rate", [1, 7, 29])
def test_a_thinned_file_decodes_less_and_gives_the_same(clips, name, rate, monkeypatch):
    """Frames that are not due and to which no other refers are left out; those that are due are the same."""
    decoded = []

    def counted(*args):
        for frame in frames_of(*args):
            decoded.append(frame.pts)
            yield frame

    frames_of = live_source.frames_of
    monkeypatch.setattr(live_source, "frames_of", counted)
    some = list(open_source(clips[name], sample_fps=rate))
    fewer = len(decoded)
    decoded.clear()
    monkeypatch.setattr(live_source, "can_skip", lambda stream, frame: False)
    want = list(open_source(clips[name], sample_fps=rate))
    assert [f.timestamp for f in some] == [f.timestamp for f in want]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(some, want, strict=True))
    if name in ("avi", "raw"):  # without stamps
        assert fewer == len(decoded)
    elif rate == 1:
        assert fewer < 0.8 * len(decoded)


def test_stamps_that_jump_back_end_the_skipping():
    """Whatever packets say, each passes once and in order; after a jump every frame counts as due."""
    stamps = [0, 8, 4, 2, 6, 16, 12, 10, 14] + list(range(100, 200)) + [50] + list(range(51, 60)) + [None]
    packets = [types.SimpleNamespace(pts=stamp, is_discard=False) for stamp in stamps]
    due = DueStamps(rate=1, unit=0.25)
    due.skipping = True
    passed = [(packet.pts, packet.pts in due) for packet in due.ahead(packets)]
    assert [stamp for stamp, _ in passed] == stamps
    before = dict(passed[:40])
    assert all(before[stamp] == (stamp % 4 == 0) for stamp in before)
    assert all(wanted for _, wanted in passed[-11:])


def test_real_speed(tmp_path):
    path = encode(tmp_path / "short.mp4", pictures(12))
    arrived, start = [], time.monotonic()
    for frame in open_source(path, realtime=True):
        arrived.append((time.monotonic() - start, frame.timestamp))
    assert all(at >= due - 0.005 for at, due in arrived), "a frame came before its time"
    assert arrived[-1][0] >= 11 / 30 - 0.005


def test_folder_and_pushed_frames(tmp_path):
    frames = pictures(11)
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{k}.png")
    got = list(open_source(tmp_path, fps=2))
    assert np.array_equal(np.stack([f.image for f in got]), frames)
    assert [f.timestamp for f in got] == [k / 2 for k in range(11)]
    assert times(frames, fps=10).tolist() == pytest.approx([k / 10 for k in range(11)])
    assert times(frames).tolist() == list(range(11))
    odd = [(frames[0], 3.0), (Image.fromarray(frames[1]), 3.5), (frames[2], 9.0)]
    assert times(odd).tolist() == [3.0, 3.5, 9.0]  # the user's own seconds stay as they are
    sizes = [frames[0], pictures(1, 24, 32)[0]]
    assert {f.image.shape for f in open_source(sizes)} == {(48, 64, 3)}  # all as the first


def test_bad_sources(clips, tmp_path):
    frames = pictures(3)
    for source, words in (
        (tmp_path / "absent.mp4", ["no such file"]),
        (tmp_path, ["no pictures"]),
        ("ftp://somewhere/clip.mp4", ["ftp://somewhere/clip.mp4", "rtsp"]),
        ("file:///etc/passwd", ["must begin with"]),
        ("concat://a|b", ["must begin with"]),
        ("rtsp://", ["name a host"]),
        ("http://[::1/x", ["must begin with"]),
        ("http://host:port/x", ["must begin with"]),
        ("http://host/a\nb", ["must begin with"]),
        (-1, ["a camera has a number", "-1"]),
        (True, ["a camera has a number", "True"]),
        (3.5, ["float"]),
    ):
        with refused(*words):
            open_source(source)  # at the call, not at the first frame
    for option in ({"fps": -1}, {"sample_fps": 0}, {"reconnect": -1}, {"timeout": 0}, {"backoff": "x"}, {"size": 0}):
        with refused(next(iter(option)), repr(next(iter(option.values())))):
            open_source(frames, **option)
    with refused("fps= is for folders"):
        open_source(clips["mp4"], fps=2)
    with refused("realtime="):
        open_source("http://127.0.0.1:1/", realtime=True)
    for given, words in (
        ([(frames[0], 1.0), (frames[1], 1.0)], ["frame 1", "increase"]),
        ([(frames[0], 1.0), (frames[1], 0.5)], ["frame 1", "0.5"]),
        ([(frames[0], float("nan"))], ["frame 0", "nan"]),
        ([frames[0] / 255.0], ["uint8", "float64"]),
        ([frames[0][..., 0]], ["(48, 64)"]),
        (["frame.png"], ["str"]),
        ([], ["no frames"]),
    ):
        with refused(*words):
            list(open_source(given))
    data = clips["mp4"].read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with refused("cut.mp4"):
        open_source(tmp_path / "cut.mp4")


# ---------------------------------------------------------------- cameras


def test_camera(monkeypatch):
    """Driver stamps where there are any, a lost camera is opened again, and a missing one is named."""
    cv2 = pytest.importorskip("cv2", reason="opencv is not installed")
    with refused("camera 87", "no such camera"):
        list(open_source(87))
    frames, opened = pictures(6), []

    class Camera:
        """Three frames, then the cable falls out; after the second time it stays out."""

        def __init__(self, number):
            opened.append(number)
            self.k = -1

        def isOpened(self):
            return len(opened) < 3

        def grab(self):
            self.k += 1
            return self.k < 3

        def get(self, what):
            return 5000 + 100.0 * self.k if what == cv2.CAP_PROP_POS_MSEC else 0.0

        def retrieve(self):
            return True, frames[3 * len(opened) - 3 + self.k][..., ::-1]

        def release(self):
            pass

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    got = []
    with refused("camera 2", "1 tries"):
        for frame in open_source(2, reconnect=1, backoff=0.05):
            got.append(frame)
    assert np.array_equal(np.stack([f.image for f in got]), frames)
    stamps = [f.timestamp for f in got]
    assert np.allclose(stamps[:3], [0, 0.1, 0.2])
    assert np.all(np.diff(stamps) > 0) and 0.04 < stamps[3] - stamps[2] < 30 and np.allclose(np.diff(stamps[3:]), 0.1)


# ---------------------------------------------------------------- streams over the network


@pytest.fixture
def serve():
    """serve(reply, ...) -> URL on loopback; the n-th connection gets the n-th reply, the ones after it a 404.

    A reply is bytes (then the connection drops), or a function that gets the handler."""
    started = []

    def start(*replies, path="live.ts", kind="video/mp2t"):
        class Handler(http.server.BaseHTTPRequestHandler):
            served = 0

            def do_GET(self):
                k, Handler.served = Handler.served, Handler.served + 1
                if k >= len(replies):
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    if callable(replies[k]):
                        replies[k](self)
                    else:
                        self.wfile.write(replies[k])

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        started.append((server, thread))
        start.handler = Handler
        return f"http://user:secret@127.0.0.1:{server.server_port}/{path}?token=hidden"

    yield start
    for server, thread in started:
        server.shutdown()
        server.server_close()
        thread.join(5)


def watch(url, **options):
    """(frames, the message it ended with)"""
    frames = []
    with refused("http://127.0.0.1:") as caught:
        for frame in open_source(url, **{"backoff": 0.1, "timeout": 20, "reconnect": 1} | options):
            frames.append(frame)
    return frames, str(caught.value)


def test_reconnects_and_keeps_the_streams_time(clips, serve):
    """The connection drops half way and the camera's clock runs on: afterwards the stamps are still its own."""
    data = clips["ts"].read_bytes()
    half = len(data) // 2 // 188 * 188
    frames, message = watch(serve(data[:half], data[half:]))
    stamps = np.array([f.timestamp for f in frames])
    truth = read_index(clips["ts"]).timestamps
    assert 90 < len(stamps) <= 120 and np.all(np.diff(stamps) > 0)
    assert np.abs(stamps[:, None] - truth).min(1).max() < 1e-6, "each is a stamp of the stream"
    assert stamps[-1] > 3 and "did not come back in 1 tries" in message
    assert "secret" not in message and "hidden" not in message and "user" not in message


def test_reconnects_to_a_stream_that_starts_anew(clips, serve):
    data = clips["ts"].read_bytes()
    start = time.monotonic()
    frames, _ = watch(serve(data[: len(data) // 2], data), backoff=0.3)
    took = time.monotonic() - start
    stamps = np.array([f.timestamp for f in frames])
    steps = np.diff(stamps)
    assert len(stamps) > 150 and np.all(steps > 0)
    k = steps.argmax()
    assert 0.3 <= steps[k] < took, "the gap is as long as we were away"
    assert np.allclose(np.delete(steps, k), 1 / 30, atol=0.04)  # the last pictures before the loss may be missing


def test_waits_longer_and_longer(clips, serve, monkeypatch):
    url, waits = serve(clips["ts"].read_bytes()), []
    monkeypatch.setattr("vlmfast.video.live_source.time.sleep", waits.append)
    frames, message = watch(url, reconnect=9, backoff=0.2)
    assert frames and waits == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0])
    assert serve.handler.served == 1 + 9 and "9 tries" in message and "404" in message


def test_a_stream_may_simply_end(clips, serve):
    data = clips["ts"].read_bytes()
    stamps = times(serve(data), reconnect=0, timeout=20)
    assert len(stamps) == 120


def test_silence_counts_as_a_loss(clips, serve):
    data, quiet = clips["ts"].read_bytes(), threading.Event()

    def stall(handler):
        handler.wfile.write(data)
        handler.wfile.flush()
        quiet.wait(60)

    start = time.monotonic()
    frames, message = watch(serve(stall), timeout=2, reconnect=0)
    quiet.set()
    assert len(frames) > 100 and "no answer for 2 s" in message and time.monotonic() - start < 20


def test_first_connection_fails_at_once(serve):
    url = serve()
    start = time.monotonic()
    frames, message = watch(url, reconnect=5, backoff=10)
    assert not frames and "404" in message and time.monotonic() - start < 10
    frames, message = watch(serve(b"this is no video " * 1000), reconnect=5, backoff=10)
    assert not frames and "cannot open" in message


def test_a_file_over_http_ends_and_resumes(clips, serve):
    """A stream of known length is over at its end; when it drops before, it goes on where it stopped."""
    data = clips["mkv"].read_bytes()
    url = serve(data[: len(data) * 2 // 3], data, path="clip.mkv", kind="video/x-matroska")
    stamps = times(url, reconnect=2, backoff=0.05, timeout=20)
    truth = read_index(clips["mkv"]).timestamps
    assert len(stamps) >= 118 and np.abs(stamps[:, None] - truth).min(1).max() < 2e-3
    assert serve.handler.served == 2


@pytest.mark.parametrize("how", list(MATRIX))
def test_a_mirrored_or_turned_stream_comes_out_upright(serve, tmp_path, how):
    frames = pictures(6)
    path = matrix(film(tmp_path / "a.mp4", frames, movflags="faststart"), tmp_path / "b.mp4", MATRIX[how])
    got = list(open_source(serve(path.read_bytes(), path="b.mp4", kind="video/mp4"), reconnect=0, timeout=20))
    assert np.array_equal(np.stack([f.image for f in got]), shown_of(frames, how))


def test_mjpeg_camera_without_stamps(serve):
    """MJPEG carries no stamps: the time of arrival counts."""
    jpegs = []
    for picture in pictures(8):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=95)
        jpegs.append(buffer.getvalue())

    def send(handler):
        for k in range(24):
            jpeg = jpegs[k % 8]
            handler.wfile.write(b"--b\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg))
            handler.wfile.write(jpeg + b"\r\n")
            handler.wfile.flush()
            time.sleep(0.05)

    stamps = times(serve(send, path="cam", kind="multipart/x-mixed-replace;boundary=b"), reconnect=0, timeout=20)
    assert len(stamps) >= 20 and np.all(np.diff(stamps) > 0)
    assert 0.3 < stamps[-1] < 60  # not 24 frames at a made-up rate of 25


def test_a_playlist_from_the_network_cannot_open_local_files(clips, serve):
    secret = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nfile://{clips['ts']}\n#EXT-X-ENDLIST\n".encode()
    frames, _ = watch(serve(secret, secret, secret, path="list.m3u8", kind="application/vnd.apple.mpegurl"))
    assert not frames


@pytest.mark.parametrize(
    "scheme", ["tcp", "udp", "rtp", "rtsp", "gopher", "concat:tcp", "subfile,,start,0,end,0,,:tcp"]
)
def test_a_playlist_from_the_network_reaches_no_other_protocol(serve, scheme):
    """Its parts come over HTTP too, or not at all: nobody knocks at the port that it names."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(0.5)
        port = door.getsockname()[1]
        text = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{scheme}://127.0.0.1:{port}\n#EXT-X-ENDLIST\n"
        url = serve(*[text.encode()] * 3, path="list.m3u8", kind="application/vnd.apple.mpegurl")
        frames, _ = watch(url, reconnect=0, timeout=3)
        assert not frames
        with pytest.raises(TimeoutError):
            door.accept()


def test_the_scheme_may_be_written_large(clips, serve):
    url = serve(clips["ts"].read_bytes())
    assert len(times(url.replace("http", "HTTP"), reconnect=0, timeout=20)) == 120


def test_broken_packets_are_passed_over(clips, serve):
    data = bytearray(clips["ts"].read_bytes())
    rng = np.random.default_rng(0)
    for k in rng.choice(len(data) // 188 - 40, 25, replace=False) + 20:  # whole packets of noise
        data[188 * k + 4 : 188 * k + 188] = rng.integers(0, 256, 184, np.uint8).tobytes()
    stamps = times(serve(bytes(data)), reconnect=0, timeout=20)
    assert len(stamps) > 30 and np.all(np.diff(stamps) > 0)


def rtp_packets(frames):
    """The RTP packets of an MPEG-2 video of these frames, as libav sends them: (bytes, ...)."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.bind(("127.0.0.1", 0))
    listener.settimeout(0.3)
    out = []
    with av.open(f"rtp://127.0.0.1:{listener.getsockname()[1]}?pkt_size=1200", "w", format="rtp") as sink:
        stream = sink.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"g": "5", "bf": "0"}
        for k, picture in enumerate([*frames, None]):
            frame = None if picture is None else av.VideoFrame.from_ndarray(picture, format="rgb24")
            if frame is not None:
                frame.pts, frame.time_base = k, Fraction(1, 25)
            sink.mux(stream.encode(frame))
            listener.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    out.append(listener.recv(2000))
    listener.close()
    return [p for p in out if p[1] & 127 == 32]  # payload type 32; the rest is housekeeping


@contextlib.contextmanager
def rtsp_camera(sessions):
    """A camera that speaks just enough RTSP over TCP: the k-th client is sent sessions[k], then cut off."""
    server = socket.create_server(("127.0.0.1", 0))

    def converse(client, packets):
        with client, client.makefile("rb") as lines:
            client.settimeout(5)
            while request := lines.readline().decode():
                method, head = request.split()[0], {}
                while line := lines.readline().decode().strip():
                    key, _, value = line.partition(": ")
                    head[key] = value
                sdp = (
                    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=cam\r\nt=0 0\r\nm=video 0 RTP/AVP 32\r\na=control:track0\r\n"
                )
                extra = {
                    "OPTIONS": "Public: DESCRIBE, SETUP, PLAY\r\n",
                    "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Length: {len(sdp)}\r\n",
                    "SETUP": f"Session: 7\r\nTransport: {head.get('Transport', '')}\r\n",
                }.get(method, "Session: 7\r\n")
                body = sdp if method == "DESCRIBE" else ""
                client.sendall(f"RTSP/1.0 200 OK\r\nCSeq: {head['CSeq']}\r\n{extra}\r\n{body}".encode())
                if method == "PLAY":
                    for packet in packets:
                        client.sendall(b"$\0" + len(packet).to_bytes(2, "big") + packet)
                        time.sleep(0.002)
                    return

    def accept():
        with contextlib.suppress(OSError):
            for packets in sessions:
                client, _ = server.accept()
                with contextlib.suppress(OSError):
                    converse(client, packets)
        server.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"rtsp://admin:secret@127.0.0.1:{server.getsockname()[1]}/cam"
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


def test_rtsp_camera_that_drops():
    packets = rtp_packets(pictures(60))
    half = len(packets) // 2
    got = []
    with rtsp_camera([packets[:half], packets[half:]]) as url, refused("rtsp://127.0.0.1", "1 tries") as caught:
        for frame in open_source(url, reconnect=1, backoff=0.05, timeout=20):
            got.append(frame)
    stamps = np.array([f.timestamp for f in got])
    assert len(stamps) > 40 and np.all(np.diff(stamps) > 0) and {f.image.shape for f in got} == {(48, 64, 3)}
    assert np.median(np.diff(stamps)) == pytest.approx(0.04, abs=1e-3)  # RTP's stamps, not when packets came
    assert "secret" not in str(caught.value)
