//! What a program needs of the machine it runs on, as its ELF headers say.

use anyhow::{Context, Result};
use object::Endianness;
use object::elf::{DT_NEEDED, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader};

/// The loader and the shared libraries that the kernel and that loader will look for. Empty: the program runs on any
/// machine with its instruction set.
pub fn needed(program: &[u8]) -> Result<Vec<String>> {
    let header = FileHeader64::<Endianness>::parse(program).context("no ELF file of 64 bits")?;
    let endian = header.endian()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut needed = Vec::new();
    for segment in header.program_headers(endian, program)? {
        needed.extend(segment.interpreter(endian, program)?.map(text));
    }
    let libraries = header.sections(endian, program)?.dynamic_table(endian, program)?;
    for entry in libraries.iter().filter(|entry| entry.tag == DT_NEEDED) {
        needed.push(text(libraries.string(entry)?));
    }
    Ok(needed)
}
