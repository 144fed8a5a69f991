//! Kernels of a few instructions: an assembler for the handful we need, and a PVH ELF file around them.
//!
//! The code runs where the PVH protocol puts it: 32-bit protected mode, flat segments, no paging. On a software-paged KVM that
//! is interpreted at about 2.4 M instructions/s, which is plenty.

/// Where the code is loaded.
pub const LOAD: u32 = 0x20_0000;
/// A word the kernels count in.
pub const COUNTER: u32 = 0x30_0000;
/// First of the pages that [`poke`] writes.
pub const PAGES: u32 = 0x40_0000;

/// A piece of machine code.
#[derive(Default)]
pub struct Code(pub Vec<u8>);

impl Code {
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
    fn word(self, opcode: &[u8], value: u32) -> Self {
        self.raw(opcode).raw(&value.to_le_bytes())
    }
    /// mov dx, port; mov al, byte; out dx, al
    pub fn out(self, port: u16, byte: u8) -> Self {
        self.raw(&[0x66, 0xba]).raw(&port.to_le_bytes()).raw(&[0xb0, byte, 0xee])
    }
    /// mov ecx, value
    pub fn mov_ecx(self, value: u32) -> Self {
        self.word(&[0xb9], value)
    }
    /// mov edi, value
    pub fn mov_edi(self, value: u32) -> Self {
        self.word(&[0xbf], value)
    }
    /// inc ecx
    pub fn inc_ecx(self) -> Self {
        self.raw(&[0x41])
    }
    /// mov [address], ecx
    pub fn store_ecx(self, address: u32) -> Self {
        self.word(&[0x89, 0x0d], address)
    }
    /// mov dword [address], value
    pub fn store(self, address: u32, value: u32) -> Self {
        self.word(&[0xc7, 0x05], address).raw(&value.to_le_bytes())
    }
    /// cmp edi, value; je +size of out; out(0x501, 0x32)
    pub fn panic_unless_edi(self, value: u32) -> Self {
        let panic = Code::default().out(0x501, 0x32).0;
        self.word(&[0x81, 0xff], value).raw(&[0x74, u8::try_from(panic.len()).unwrap()]).raw(&panic)
    }
    /// jmp back to byte `to` of the code
    pub fn jump_to(self, to: usize) -> Self {
        let next = i32::try_from(self.0.len()).unwrap() + 5;
        let offset = i32::try_from(to).unwrap() - next;
        self.raw(&[0xe9]).raw(&offset.to_le_bytes())
    }
    /// hlt
    pub fn hlt(self) -> Self {
        self.raw(&[0xf4])
    }
}

fn put(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if file.len() < at + bytes.len() {
        file.resize(at + bytes.len(), 0);
    }
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A PVH ELF file with `code` at [`LOAD`], where it is entered.
pub fn kernel(code: &Code) -> Vec<u8> {
    const CODE_AT: usize = 0x1000;
    const NOTE_AT: usize = 0x100;
    let mut file = Vec::new();
    let ident = [0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
    put(&mut file, 0, &ident);
    put(&mut file, 16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&mut file, 24, &u64::from(LOAD).to_le_bytes());
    put(&mut file, 32, &64u64.to_le_bytes());
    put(&mut file, 52, &[64, 0, 56, 0, 2, 0]);
    put(&mut file, 64, &[0; 112]);
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&LOAD.to_le_bytes());
    let bytes = u64::try_from(code.0.len()).unwrap();
    let segments =
        [(1u32, CODE_AT, u64::from(LOAD), bytes), (4, NOTE_AT, 0, u64::try_from(note.len()).unwrap())];
    for (number, (kind, offset, address, bytes)) in segments.into_iter().enumerate() {
        let at = 64 + 56 * number;
        put(&mut file, at, &kind.to_le_bytes());
        put(&mut file, at + 4, &7u32.to_le_bytes());
        put(&mut file, at + 8, &u64::try_from(offset).unwrap().to_le_bytes());
        put(&mut file, at + 16, &address.to_le_bytes());
        put(&mut file, at + 24, &address.to_le_bytes());
        put(&mut file, at + 32, &bytes.to_le_bytes());
        put(&mut file, at + 40, &bytes.to_le_bytes());
    }
    put(&mut file, NOTE_AT, &note);
    put(&mut file, CODE_AT, &code.0);
    file
}

/// Writes `M`, then counts in a register and in memory for ever; a second register must keep its value.
pub fn counter() -> Vec<u8> {
    const KEPT: u32 = 0xdead_beef;
    let start = Code::default().out(0x3f8, b'M').mov_ecx(0).mov_edi(KEPT);
    let again = start.0.len();
    kernel(&start.inc_ecx().store_ecx(COUNTER).panic_unless_edi(KEPT).jump_to(again))
}

/// Writes `M`, then for each byte of serial input: increments the word at the start of page [`PAGES`] + byte, and sends the byte back.
pub fn poke() -> Vec<u8> {
    let start = Code::default().out(0x3f8, b'M');
    let again = start.0.len();
    let code = start
        // mov dx, 0x3fd; in al, dx; test al, 1; jz again
        .raw(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7])
        // mov dx, 0x3f8; in al, dx; movzx eax, al; mov ecx, eax; shl eax, 12
        .raw(&[0x66, 0xba, 0xf8, 0x03, 0xec, 0x0f, 0xb6, 0xc0, 0x89, 0xc1, 0xc1, 0xe0, 0x0c])
        // inc dword [eax + PAGES]
        .word(&[0xff, 0x80], PAGES)
        // mov al, cl; out dx, al
        .raw(&[0x88, 0xc8, 0xee])
        .jump_to(again);
    kernel(&code)
}

/// Writes `M` and then `byte` to `port`, and halts.
pub fn outb(port: u16, byte: u8) -> Vec<u8> {
    let code = Code::default().out(0x3f8, b'M').out(port, byte);
    let here = code.0.len();
    kernel(&code.hlt().jump_to(here))
}
