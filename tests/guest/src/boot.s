# PVH entry to ring 3, the few ring-0 services, and the start of further vCPUs. AT&T syntax.
#
# Ring 0 may be interpreted (see README.md), so this file does as little as possible with the plainest
# instructions: tables that can be constants are constants, everything else is built by Rust in ring 3.
# Ring 3 always runs with interrupts off; they arrive only in the `sti; hlt` of ring0_idle. So no stub has
# to save registers that the caller of ring 0 has not already given up (rax, rcx, rdx).

.set SEL_CODE0,   0x08
.set SEL_DATA0,   0x10
.set SEL_DATA3,   0x1b
.set SEL_CODE3,   0x23
.set SEL_TSS,     0x28
.set COM1,        0x3f8
.set MSR_EFER,    0xc0000080
.set MSR_EOI,     0x80b
.set XAPIC_EOI,   0xfee000b0
.set TSS_BYTES,   104 + 8192 + 8
.set VECTORS,     64

.section .note.pvh, "a", @note
    .align 4
    .long 4, 8, 18                      # name bytes, descriptor bytes, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

# ---------------------------------------------------------------- entry, 32 bit, flat, paging off
.section .boot, "ax", @progbits
.code32
.global pvh_entry
pvh_entry:
    movl    $tss0, %eax                 # the TSS descriptor wants its address in three pieces
    movw    %ax, gdt + SEL_TSS + 2
    shrl    $16, %eax
    movb    %al, gdt + SEL_TSS + 4
    movb    %ah, gdt + SEL_TSS + 7
    movl    $long_mode_bsp, %edi
enter_long_mode:                        # edi: 64-bit address to go on at; ebx is kept
    lgdt    gdt_pointer
    movl    $0x620, %eax                # PAE, OSFXSR, OSXMMEXCPT
    movl    %eax, %cr4
    movl    $pml4, %eax
    movl    %eax, %cr3
    movl    $MSR_EFER, %ecx
    rdmsr
    orl     $0x100, %eax                # LME
    wrmsr
    movl    $0x80000033, %eax           # PG, NE, ET, MP, PE
    movl    %eax, %cr0
    ljmp    $SEL_CODE0, $long_mode

.code64
long_mode:
    movl    %edi, %edi
    jmp     *%rdi

long_mode_bsp:
    movw    $COM1, %dx                  # the contract: the first thing done in 64-bit mode
    movb    $0x4d, %al
    outb    %al, %dx
    movl    $SEL_TSS, %ecx
    movl    $stack0_ring0_top, %esp
    movl    $stack0_top, %esi
    movl    $rust_main, %edx
    movl    %ebx, %edi                  # hvm_start_info, the argument of rust_main

to_ring3:                               # ecx TSS selector, esp ring-0 stack, esi ring-3 stack, edx function, edi its argument
    movl    $SEL_DATA0, %eax
    movl    %eax, %ds
    movl    %eax, %es
    movl    %eax, %ss
    lidt    idt_pointer
    ltr     %cx
    subl    $8, %esi                    # as if called: 16 n + 8
    pushq   $SEL_DATA3
    pushq   %rsi
    pushq   $2                          # flags: interrupts off
    pushq   $SEL_CODE3
    pushq   %rdx
    movl    $SEL_DATA3, %eax
    movl    %eax, %ds
    movl    %eax, %es
    iretq

# ---------------------------------------------------------------- ring 0 on behalf of ring 3
# Called by `ud2` at ring0_call, the only place where #UD is not an error.
# edi: 0 idle, 1 rdmsr, 2 wrmsr. ecx: MSR. edx:eax: value. Clobbers eax, ecx, edx.
.global ring0_call
ring0_call:
    ud2
    ret

.balign 16
invalid_opcode:
    cmpq    $ring0_call, (%rsp)
    jne     invalid_opcode_error
    addq    $2, (%rsp)
    cmpl    $1, %edi
    je      1f
    testl   %ecx, %ecx                  # idle: ecx = 0, or the MSR that arms the timer
    je      2f
    wrmsr
2:  testl   %edi, %edi
    jne     3f
    sti
    hlt
    cli
3:  iretq
1:  rdmsr
    iretq
invalid_opcode_error:
    pushq   $0
    pushq   $6
    jmp     exception

# ---------------------------------------------------------------- interrupts: count, end, return
irq_common:                             # the stub left the address of its counter in rax
    incl    (%rax)
    cmpl    $0, x2apic_on
    je      1f
    movl    $MSR_EOI, %ecx
    xorl    %eax, %eax
    xorl    %edx, %edx
    wrmsr
    iretq
1:  movl    $XAPIC_EOI, %eax
    movl    $0, (%rax)
    iretq

# ---------------------------------------------------------------- exceptions: note them, go to rust_exception in ring 3
exception:                              # stack: vector, error, rip, cs, flags, rsp, ss
    movq    (%rsp), %rax
    movq    %rax, exception_info
    movq    8(%rsp), %rax
    movq    %rax, exception_info + 8
    movq    16(%rsp), %rax
    movq    %rax, exception_info + 16
    movq    24(%rsp), %rax
    movq    %rax, exception_info + 24
    movq    %cr2, %rax
    movq    %rax, exception_info + 32
    movl    $SEL_DATA3, %eax
    pushq   %rax
    movl    $stack_exception_top - 8, %eax
    pushq   %rax
    pushq   $2
    pushq   $SEL_CODE3
    movl    $rust_exception, %eax
    pushq   %rax
    iretq

.global vector_stubs
.balign 16
vector_stubs:                           # 16 bytes each
.set vector, 0
.rept 32
    .balign 16
    .if vector == 6
    jmp     invalid_opcode
    .else
    .if (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    pushq   $0
    .endif
    pushq   $vector
    jmp     exception
    .endif
    .set vector, vector + 1
.endr
.rept VECTORS - 32
    .balign 16
    movl    $irq_counts + 4 * (vector - 32), %eax
    jmp     irq_common
    .set vector, vector + 1
.endr

# ---------------------------------------------------------------- start of further vCPUs
# Copied to a page below 1 MiB; the words at its end are filled in by smp.rs before each start.
.global ap_trampoline
.global ap_trampoline_end
.global ap_arguments
.code16
.balign 16
ap_trampoline:
    cli
    movw    %cs, %ax
    movw    %ax, %ds
    lgdtl   (ap_gdt_pointer - ap_trampoline)
    movl    $0x11, %eax
    movl    %eax, %cr0
    ljmpl   $(ap_gdt_code32), $ap_protected
.balign 8
ap_gdt_pointer:
    .word   gdt_end - gdt - 1
    .long   gdt
ap_trampoline_end:
.code32
ap_protected:
    movl    $SEL_DATA0, %eax
    movl    %eax, %ds
    movl    %eax, %ss
    movl    $long_mode_ap, %edi
    jmp     enter_long_mode
.code64
long_mode_ap:
    movl    ap_arguments, %ecx          # TSS selector
    movl    ap_arguments + 4, %esp      # ring-0 stack
    movl    ap_arguments + 8, %esi      # ring-3 stack
    movl    ap_arguments + 12, %edi     # vCPU number
    movl    $rust_ap_main, %edx
    jmp     to_ring3

# ---------------------------------------------------------------- tables
.section .boot.tables, "aw", @progbits
.balign 4096
.global pml4
.global pdpt
pml4:                                   # 0x67: present, writable, user, accessed, dirty
    .quad   pdpt + 0x67
    .fill   511, 8, 0
pdpt:                                   # the first 4 GiB; map.rs adds what lies above
    .quad   pd + 0x67, pd + 0x1067, pd + 0x2067, pd + 0x3067
    .fill   508, 8, 0
pd:
    .set    frame, 0
    .rept   2048
    .quad   (frame << 21) + 0xe7        # 0x80: 2 MiB page
    .set    frame, frame + 1
    .endr

.global gdt
.balign 16
gdt:
    .quad   0
    .quad   0x00af9b000000ffff          # 0x08 code, ring 0, 64 bit
    .quad   0x00cf93000000ffff          # 0x10 data, ring 0
    .quad   0x00cff3000000ffff          # 0x18 data, ring 3
    .quad   0x00affb000000ffff          # 0x20 code, ring 3, 64 bit
    .quad   0x0000890000000000 + TSS_BYTES - 1   # 0x28 TSS of vCPU 0, address filled in above
    .quad   0
    .fill   2 * 15, 8, 0                # TSSs of the others, filled in by smp.rs
gdt_code32:
    .quad   0x00cf9b000000ffff          # code, ring 0, 32 bit: only for the trampoline
gdt_end:
.set ap_gdt_code32, gdt_code32 - gdt

gdt_pointer:
    .word   gdt_end - gdt - 1
    .quad   gdt
.balign 8
idt_pointer:
    .word   VECTORS * 16 - 1
    .quad   idt

.balign 16
tss0:
    .long   0
    .quad   stack0_ring0_top            # rsp0
    .fill   90, 1, 0
    .word   104                         # I/O bitmap: all ports allowed
    .fill   8192, 1, 0
    .fill   8, 1, 0xff

.section .bss.boot, "aw", @nobits
.global idt
.global irq_counts
.global x2apic_on
.global exception_info
.balign 16
idt:                .skip VECTORS * 16
exception_info:     .skip 40
irq_counts:         .skip 4 * (VECTORS - 32)
x2apic_on:          .skip 4
ap_arguments:       .skip 16
.balign 16
                    .skip 4096
stack0_ring0_top:
                    .skip 128 * 1024
stack0_top:
                    .skip 16 * 1024
stack_exception_top:
