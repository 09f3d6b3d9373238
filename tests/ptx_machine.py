"""One lane that carries out what PTX it takes to expand packed rows: integer instructions, and loads and stores."""

from __future__ import annotations

import re

import numpy as np

WORD = 0xFFFFFFFF
STATEMENT = re.compile(r"([\w.:]+)\s+(.*)", re.DOTALL)


def byte(word, i):
    return word >> 8 * i & 0xFF


def signed(x, bits):
    return x - (1 << bits) if x >> bits - 1 else x


def permuted(a, b, selector):
    """prmt.b32: of eight bytes four; digits of 8 and more ask for the sign of a byte."""
    pool = [byte(x, i) for x in (a, b) for i in range(4)]
    chosen = [(pool[digit & 7], digit & 8) for digit in (selector >> 4 * i & 0xF for i in range(4))]
    return sum((0xFF * (x >> 7) if sign else x) << 8 * i for i, (x, sign) in enumerate(chosen))


def dot_two(weights, bytes_, total, first):
    """dp2a.s32.u32: two 16-bit weights, and bytes from ``first`` on."""
    return total + sum(signed(weights >> 16 * i & 0xFFFF, 16) * byte(bytes_, first + i) for i in range(2))


def halves(words):
    """float16 in the halves of 32-bit words."""
    return np.array([words], dtype=np.uint32).view(np.float16).astype(np.float64)


def multiply_add(a, b, c):
    """fma.rn.f16x2: rounded once, as float64 holds products and sums of such numbers exactly."""
    return int((halves(a) * halves(b) + halves(c)).astype(np.float16).view(np.uint32)[0])


OPERATIONS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": min,
    "shr": lambda a, b: a >> b,
    "mad.lo": lambda a, b, c: a * b + c,
    "prmt": permuted,
    "fma.rn": multiply_add,
    "dp2a.lo.s32": lambda a, b, c: dot_two(a, b, c, 0),
    "dp2a.hi.s32": lambda a, b, c: dot_two(a, b, c, 2),
    "dp4a.u32": lambda a, b, c: c + sum(byte(a, i) * byte(b, i) for i in range(4)),
}


class Lane:
    """registers: by name. shared: 32-bit words by their address.

    stored_apart: bytes between the lane's words of the matrices that it stores. The address of a matrix is here that of
    its word.
    """

    def __init__(self, lane, stored_apart=128, **registers):
        self.registers = registers | {"%laneid": lane}
        self.stored_apart = stored_apart
        self.shared = {}

    def run(self, lines):
        text = re.sub(r"\{(?=\s*\.reg)|(?<=;)\s*\}|^\}", "", "\n".join(lines), flags=re.MULTILINE)
        for statement in filter(None, (s.strip() for s in text.split(";"))):
            if not statement.startswith((".reg", "bar.warp")):
                self._step(*STATEMENT.fullmatch(statement).groups())
        return self

    def _step(self, operation, operands):
        name = operation.rpartition(".")[0]
        if name.startswith("ld.shared"):
            targets, address = re.fullmatch(r"\{?([\w,]+)\}?,\s*\[(.*)\]", operands).groups()
            for i, target in enumerate(targets.split(",")):
                self.registers[target] = self.shared.get(self._address(address) + 4 * i, 0xDEADBEEF)
        elif name.startswith("st.shared"):
            address, source = re.fullmatch(r"\[(.*)\],\s*(\w+)", operands).groups()
            self.shared[self._address(address)] = self._value(source)
        elif name.startswith("stmatrix"):
            address, sources = re.fullmatch(r"\[(.*)\],\s*\{(.*)\}", operands).groups()
            for i, source in enumerate(sources.split(",")):
                self.shared[self._address(address) + self.stored_apart * i] = self._value(source)
        elif name == "mov" and operands.startswith("{"):
            lower, upper, source = re.split(r"[\s,{}]+", operands.strip("{"))
            self.registers[lower], self.registers[upper] = (self._value(source) >> 16 * i & 0xFFFF for i in range(2))
        elif name == "mov" and operands.endswith("}"):
            target, lower, upper = re.split(r"[\s,{}]+", operands.strip("}"))
            self.registers[target] = self._value(lower) | self._value(upper) << 16
        else:
            target, *sources = re.split(r"\s*,\s*", operands)
            self.registers[target] = OPERATIONS[name](*map(self._value, sources)) & WORD

    def _value(self, operand):
        known = operand in self.registers
        return self.registers[operand] if known else int(operand, 0) & WORD

    def _address(self, text):
        base, _, offset = text.partition("+")
        return self._value(base) + int(offset or 0)
