"""What a chat template writes: jinja2 source that comes with a model, or with a form (chat.CHATS).

It runs in jinja2's ImmutableSandboxedEnvironment, as in transformers, so that it can neither reach
Python nor change what it is given. Its length, the turns of its loops and what it writes are
bounded. That of a model, which a stranger may have written, runs in a process of its own: there
the system bounds the time and the memory of whatever else a template may ask for.
"""
import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import threading

# Around what {% generation %} holds; Unicode keeps it out of texts, as tokenizer.BREAK.
MARK = '\ufdd1'

MAX_SOURCE = 64 << 10           # characters of a template
MAX_TEXT = 4 << 20              # characters that it may write
MAX_TURNS = 1 << 20             # of its loops, all together
MAX_SECONDS = 5                 # for one conversation
MAX_MEMORY = 1 << 29            # bytes of the process that it runs in


@functools.lru_cache(8)
def compile_template(source):
    """Jinja2 source -> a template in the environment that transformers gives it, less strftime_now
    and what is random: a run must not depend on the day or on chance (templates that ask for the
    day have a date of their own)."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Sandbox(ImmutableSandboxedEnvironment):
        # jinja2 would write nothing in its place.
        def unsafe_undefined(self, obj, attribute):
            owner = type(obj).__name__
            raise SecurityError(f'access to attribute {attribute!r} of {owner!r} is unsafe')

    # {% generation %} ... {% endgeneration %}: what it holds is an answer, says transformers.
    class Generation(jinja2.ext.Extension):
        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
            return nodes.CallBlock(self.call_method('around'), [], [], body).set_lineno(line)

        def around(self, caller):
            return MARK + caller() + MARK

    @jinja2.pass_environment
    def counted(env, items):
        for item in items:
            env.turns += 1
            if env.turns > MAX_TURNS:
                raise ValueError(f'its loops take more than {MAX_TURNS} turns')
            yield item

    def stop(message):
        raise jinja2.TemplateError(str(message))

    # jinja2's own would escape what HTML can not hold.
    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    if len(source) > MAX_SOURCE:
        raise ValueError(f'longer than {MAX_SOURCE} characters')
    extensions = [Generation, jinja2.ext.loopcontrols]
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    env.filters |= dict(tojson=tojson, counted=counted)
    env.globals['raise_exception'] = stop
    del env.globals['lipsum'], env.filters['random']

    # Every loop goes through `counted`, wherever it stands.
    tree = env.parse(source)
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = nodes.Filter(loop.iter, 'counted', [], [], None, None)
    return jinja2.Template.from_code(env, env.compile(tree), env.make_globals(None))


def write(source, messages, asking, names):
    """The text of [{role, content}, ...], up to where the next answer begins if `asking`; names:
    {name: text} that the template may use. A template may raise anything."""
    template = compile_template(source)
    text, template.environment.turns = '', 0
    # Piece by piece, so that what has no end is stopped.
    for part in template.generate(messages=messages, add_generation_prompt=asking, tools=None,
                                  documents=None, **names):
        text += part
        if len(text) > MAX_TEXT:
            raise ValueError(f'it writes more than {MAX_TEXT} characters')
    return text


# -------------------------------------------------------------------------------------------------
# in a process of its own: a line of JSON is asked, and one is answered


class Apart:
    """The process in which templates of others run, started when it is needed. seconds: of a
    processor, for one conversation."""

    def __init__(self, seconds=MAX_SECONDS):
        self.seconds = seconds
        self.process, self.owner, self.lock = None, 0, threading.Lock()
        atexit.register(self.close)

    def start(self):
        """See that it runs, and is this process's own."""
        # One that was forked has the pipes of the one before it.
        if self.process is None or self.owner != os.getpid():
            self.owner = os.getpid()
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), str(self.seconds)], text=True,
                encoding='utf-8', stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL)

    def close(self):
        if self.process and self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None

    def write(self, *request):
        """As `write` above. Raises ValueError."""
        with self.lock:
            self.start()
            answer = ''
            try:
                self.process.stdin.write(json.dumps(request) + '\n')
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except BrokenPipeError:
                pass

            # No answer: the system has ended it.
            if not answer:
                code = self.process.wait()
                self.close()
                if code == -signal.SIGPROF:
                    raise ValueError(f'it takes more than {self.seconds} seconds')
                raise ValueError(f'the process that runs it has ended ({code})')
        error, text = json.loads(answer)
        if error:
            raise ValueError(error)
        return text


apart = Apart()


def main():
    """The process itself, until nobody asks any more."""
    import resource
    seconds = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # of Ctrl-C the other one hears
    for line in sys.stdin:
        # Not those of a clock: others may keep the processor busy.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer = '', write(*json.loads(line))
        except Exception as error:
            answer = f'{error}'[:300] or type(error).__name__, ''
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == '__main__':
    main()
